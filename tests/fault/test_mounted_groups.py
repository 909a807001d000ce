"""A damaged byte in each region of a group, read through a real mount: an error for its files only."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from casfs.digest import Digest
from casfs.format.pack import BLOB_HEADER
from casfs.format.tree import NodeType
from casfs.index.schema import Location
from casfs.repository.opening import OpenOptions, open_for_reading
from casfs.store.blob_store import pack_name
from tests.support.cli import Casfs
from tests.support.encryption import PUBLIC, SECRET, unlock
from tests.support.mounts import mounted
from tests.support.stores import flip, noise

KIB = 1 << 10
FILES = 72

HEADER_REGIONS = {"magic": -16, "kind": -12, "codec": -11, "zeros": -10, "stored": -8, "plain": -4}
"""Where a field of the record's header begins, from the payload on. With an index no reader needs it."""

PAYLOAD_REGIONS = {
    "begin": 0.0,
    "frame header": 0.00001,
    "table of sizes": 0.001,
    "first quarter": 0.25,
    "middle": 0.5,
    "last quarter": 0.75,
    "before the end": 0.9999,
    "end": 1.0,
}

pytestmark = pytest.mark.fuse


@dataclass(frozen=True, slots=True)
class DamagedGroups:
    """A repository in which each group is damaged in another region, and the files of each group."""

    casfs: Casfs
    arguments: tuple[str | Path, ...]
    contents: dict[str, bytes]
    hit: dict[str, list[str]]
    source: Path

    def intact(self) -> set[str]:
        return self.contents.keys() - {name for names in self.hit.values() for name in names}


def groups_of(
    root: Path, options: OpenOptions
) -> dict[tuple[Path, int], tuple[Location, list[str]]]:
    """Return the files of each group, by its pack and offset."""
    found: dict[tuple[Path, int], tuple[Location, list[str]]] = {}
    with open_for_reading(root, options) as repository:
        _, snapshot = repository.snapshots.resolve("latest")
        for path, node in repository.trees.walk(snapshot.root):
            if node.kind != NodeType.FILE:
                continue
            (digest,) = repository.content(node).blobs()
            location = repository.store.index.lookup(Digest(digest))
            assert location is not None
            if location.is_grouped:
                pack = root / pack_name(repository.store.index.pack_ref(location.pack))
                _, names = found.setdefault((pack, location.offset), (location, []))
                names.append(os.fsdecode(path.rpartition(b"/")[2]))
    return found


@pytest.fixture(params=["plain", "encrypted"])
def damaged(
    request: pytest.FixtureRequest, tmp_path: Path, own_home: Path
) -> Iterator[DamagedGroups]:
    is_encrypted = request.param == "encrypted"
    source = tmp_path / "source"
    source.mkdir()
    contents = {}
    for number in range(FILES):
        name = f"file {number:02}"
        contents[name] = noise(name, 40 * KIB).hex().encode()
        (source / name).write_bytes(contents[name])
    (tmp_path / "home").mkdir()
    root = tmp_path / "repository"
    casfs = Casfs(root, tmp_path / "home")
    arguments: tuple[str | Path, ...] = ()
    casfs.run("init", *(("--recipient", PUBLIC) if is_encrypted else ()))
    if is_encrypted:
        identity = tmp_path / "identity"
        identity.write_text(SECRET + "\n")
        identity.chmod(0o600)
        arguments = ("--identity", identity)
    casfs.run("backup", source, *arguments)
    groups = groups_of(root, OpenOptions(unlock=unlock if is_encrypted else None))
    regions = {**HEADER_REGIONS, **PAYLOAD_REGIONS}
    assert len(groups) > len(regions)
    hit = {}
    for (region, where), ((pack, offset), (location, names)) in zip(
        regions.items(), sorted(groups.items()), strict=False
    ):
        at = where if isinstance(where, int) else int(where * (location.stored_bytes - 1))
        assert -BLOB_HEADER.size <= at < location.stored_bytes
        flip(pack, offset + at)
        hit[region] = names
    yield DamagedGroups(casfs, arguments, contents, hit, source)


def read(path: Path) -> bytes | None:
    """Return the content of a file, or None where reading it fails with EIO."""
    try:
        return path.read_bytes()
    except OSError as error:
        assert error.errno == errno.EIO, f"{path} cannot be read: {error}"
        return None


def read_a_page(path: Path, size: int) -> bytes | None:
    """Return the last page of a file, which is the first that is read of it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, mmap.PAGESIZE, size // mmap.PAGESIZE * mmap.PAGESIZE)
    except OSError as error:
        assert error.errno == errno.EIO
        return None
    finally:
        os.close(fd)


def test_a_damaged_byte_in_any_region_of_a_group_is_an_error_of_its_files_only(
    damaged: DamagedGroups, tmp_path: Path
) -> None:
    with mounted(damaged.casfs, "latest", *damaged.arguments, at=tmp_path / "mounted") as top:
        folder = top / str(damaged.source).lstrip("/")
        for name, content in damaged.contents.items():
            last = read_a_page(folder / name, len(content))
            assert last is None or content.endswith(last)
        # In an order that is not that of the groups, and twice, from caches and without.
        found = {}
        for name in sorted(damaged.contents, key=lambda name: name[::-1]) * 2:
            found[name] = read(folder / name)
            assert found[name] in (None, damaged.contents[name]), f"{name} has wrong bytes"
        assert {name for name in damaged.intact() if found[name] is None} == set()
        for region, names in damaged.hit.items():
            lost = [name for name in names if found[name] is None]
            assert bool(lost) == (region in PAYLOAD_REGIONS), f"{region}: {lost} of {names}"
        # One damaged group costs no neighbour, and a walk over all of them goes on.
        assert sorted(os.listdir(folder)) == sorted(damaged.contents)


def test_a_restore_of_damaged_groups_names_the_files_that_a_mount_cannot_read(
    damaged: DamagedGroups, tmp_path: Path
) -> None:
    target = tmp_path / "restored"
    done = damaged.casfs.run(
        "restore", "latest", "--target", target, *damaged.arguments, "--json", expect=5
    )
    folder = target / str(damaged.source).lstrip("/")
    named = {os.path.basename(str(one["path"])) for one in done.of_type("problem")}
    restored = {path.name for path in folder.iterdir()}
    assert restored | named == damaged.contents.keys() and not restored & named
    assert restored >= damaged.intact()
    for name in restored:
        assert (folder / name).read_bytes() == damaged.contents[name]
