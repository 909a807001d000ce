"""A repository that an attacker has changed, and every command that opens it.

Two kinds of enemy. One changes bytes of any file, also undetectably: the names and
digests are made to fit again. The other knows the format, writes any bytes as a tree and makes a
snapshot that leads there. Whatever they do: no error but casfs's own, in bounded time and memory, nothing
written outside a restore's target, and nothing given out that does not have its digest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import example, given, settings
from hypothesis import strategies as st

from casfs.digest import Digest, PackId, SnapshotId, digest_of
from casfs.errors import CasfsError
from casfs.format.codec import BlobKind
from casfs.format.pack import PACK_PREFIXES, TRAILER, PackRef, parse_trailer
from casfs.format.snapshot import HEADER, decode_snapshot
from casfs.repository.opening import OpenOptions, open_for_writing
from casfs.repository.repository import Repository
from casfs.store.blob_store import pack_name
from tests.support.damage import IntactRepository
from tests.support.effort import EFFORT
from tests.support.observation import LOST
from tests.support.process_runner import Scene, Stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 * EFFORT)]

# Each example is a repository that goes through eight verbs.
SETTINGS = settings(max_examples=25 * EFFORT)

VERBS: dict[str, dict[str, Any]] = {
    "look": {},
    "look_through_the_mount": {},
    "check": {},
    "prune": {"share": 0.0},
    "repair_index": {},
    "repair_snapshots": {},
}


@dataclass(frozen=True, slots=True)
class Edit:
    """A change to a file: at a share of its length some bytes go and others come."""

    where: float
    gone: int
    come: bytes

    def apply(self, data: bytes) -> bytes:
        at = int(self.where * len(data))
        return data[:at] + self.come + data[at + self.gone :]


EDITS = st.builds(
    Edit,
    st.floats(0, 1),
    st.sampled_from([0, 1, 1, 1, 2, 4, 8, 100, 1 << 30]),
    st.one_of(
        st.binary(max_size=4),
        st.sampled_from([b"\xff" * 4, b"\xff" * 8, bytes(8), b"\x7f\xff\xff\xff", b"A" * 5000]),
    ),
)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage() as found:
        yield found


@pytest.fixture(scope="module")
def intact(stage: Stage) -> Iterator[IntactRepository]:
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield IntactRepository(stage, Path(folder))


def tampered_copy(intact: IntactRepository) -> Scene:
    original = intact.scene
    root = original.root.with_name("tampered")
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(original.root, root)
    return Scene(original.stage, root, original.source)


def must_withstand(scene: Scene, intact: IntactRepository, trusts_snapshots: bool) -> None:
    """Try every verb on copies; `Stage.act` sees to it that none hangs, dies, grows, or has a bug."""
    kept = scene.root.with_name("tampered copy")
    for verb, arguments in VERBS.items():
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(scene.root, kept, symlinks=True)
        outcome = scene.stage.act(verb, kept, **arguments)
        if outcome.error is None and verb.startswith("look") and trusts_snapshots:
            for name, files in outcome.result.items():
                truth = intact.published.get(name, {})
                for path, found in files.items():
                    assert found in (LOST, truth.get(path)), f"{path} is given as {found}"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(scene.root, kept, symlinks=True)
    scene.stage.act("backup", kept, source=str(scene.source / "b"))
    _must_restore_inside(scene, kept)
    shutil.rmtree(kept)


def _must_restore_inside(scene: Scene, root: Path) -> None:
    """Restore into a target in which links lead outside, and look at what is there."""
    place = root.with_name("place")
    shutil.rmtree(place, ignore_errors=True)
    target, outside = place / "target", place / "outside"
    target.mkdir(parents=True)
    outside.mkdir()
    (outside / "precious").write_bytes(b"precious")
    names = {Path(os.fsdecode(bytes(scene.source))).parts[1], "a", "b", "x"}
    for name in names:
        (target / name).symlink_to(outside)
    before = _states(outside)
    scene.stage.act("restore", root, target=str(target), salvage=True, verify=True)
    assert _states(outside) == before, "a restore wrote outside its target"
    assert sorted(os.listdir(place)) == ["outside", "target"]
    shutil.rmtree(place)


def _states(folder: Path) -> list[tuple[str, int, int, int]]:
    found = [folder, *sorted(folder.rglob("*"))]
    return [(str(p), p.lstat().st_mode, p.lstat().st_mtime_ns, p.lstat().st_size) for p in found]


@SETTINGS
@given(
    edits=st.lists(st.tuples(st.integers(0, 1 << 16), EDITS), min_size=1, max_size=5),
    seals=st.booleans(),
)
def test_bytes_changed_in_any_files_are_found_and_do_no_other_harm(
    intact: IntactRepository, edits: list[tuple[int, Edit]], seals: bool
) -> None:
    scene = tampered_copy(intact)
    files = sorted(path for path in scene.root.rglob("*") if path.is_file())
    # Folders with many packs are no more likely than the others.
    kinds = sorted({path.relative_to(scene.root).parts[0] for path in files})
    for choice, edit in edits:
        kind = kinds[choice % len(kinds)]
        of_kind = [p for p in files if p.relative_to(scene.root).parts[0] == kind and p.exists()]
        if not of_kind:
            continue
        path = of_kind[choice // len(kinds) % len(of_kind)]
        path.write_bytes(edit.apply(path.read_bytes()))
        if seals:
            _make_it_fit(path, kind)
    must_withstand(scene, intact, trusts_snapshots=not seals)


def _make_it_fit(path: Path, kind: str) -> None:
    """Make names and checksums fit what a file has become, as far as it has any."""
    data = path.read_bytes()
    if kind == "config":
        body = data.rpartition(b"blake3 ")[0]
        path.write_bytes(body + b"blake3 " + blake3(body).hexdigest().encode() + b"\n")
    elif kind in PACK_PREFIXES:
        name = PackId(digest_of(data))
        try:
            offset, size, count, _ = parse_trailer(name, data[-TRAILER.size :], len(data))
        except CasfsError:
            pass
        else:
            directory = digest_of(data[offset : offset + size])
            reported = TRAILER.unpack(data[-TRAILER.size :])
            assert reported[2] == count
            data = data[: -TRAILER.size] + TRAILER.pack(*reported[:3], directory, *reported[4:])
        new = path.parents[2] / pack_name(
            PackRef(PackId(digest_of(data)), path.parts[-3] == "meta")
        )
        new.parent.mkdir(exist_ok=True)
        path.unlink()
        new.write_bytes(data)
    elif kind in ("snapshots", "condemned"):
        path.unlink()
        path.with_name(digest_of(data).hex()).write_bytes(data)


NAMES = st.sampled_from(
    [b"..", b".", b"/", b"a/b", b"../x", b"\0", b"", b"x" * 256, b"/etc/x", b"a\nb", b"b", b"0"]
)


@SETTINGS
@example(depth=2, edits=[], swap=None)
@example(depth=0, edits=[], swap=(0, b".."))
@example(depth=0, edits=[], swap=(1, b"../x"))
@given(
    depth=st.integers(0, 4),
    edits=st.lists(EDITS, max_size=3),
    swap=st.none() | st.tuples(st.integers(0, 40), NAMES),
)
def test_trees_and_snapshots_of_any_bytes_that_verify_do_no_harm(
    intact: IntactRepository, depth: int, edits: list[Edit], swap: tuple[int, bytes] | None
) -> None:
    scene = tampered_copy(intact)
    with open_for_writing(scene.root, "test", OpenOptions(sync=False)) as repository:
        _, snapshot = repository.snapshots.resolve(intact.first)
        assert snapshot.root.tree is not None
        chain = [snapshot.root.tree.digest]
        inside = [*os.fsencode(scene.source).lstrip(b"/").split(b"/"), b"a"]
        for end in range(1, len(inside) + 1):
            node = repository.trees.resolve(snapshot.root, b"/".join(inside[:end]))
            assert node is not None and node.tree is not None
            chain.append(node.tree.digest)
        chain = chain[: max(1, len(chain) - depth)]
        data = repository.store.read(Digest(chain[-1]))
        for edit in edits:
            data = edit.apply(data)[: 16 << 20]
        if swap is not None:
            data = _with_other_name(data, *swap)
        writer = repository.writer()
        old, new = chain[-1], digest_of(data)
        writer.put(BlobKind.TREE, new, data)
        for above in reversed(chain[:-1]):
            # Digests stand in a tree as they are, so the way down is led to the forged one.
            data = repository.store.read(Digest(above)).replace(old, new)
            old, new = above, digest_of(data)
            writer.put(BlobKind.TREE, new, data)
        writer.finish()
        _forge_snapshot(repository, intact.first, old, new, edits if depth == 4 else [])
    if not edits and swap is None:
        # What is forged is believed: what the enemy changes is looked at indeed.
        found = scene.act("look").done()
        assert intact.first not in found
        assert intact.published[intact.first] in found.values()
    must_withstand(scene, intact, trusts_snapshots=False)


def _with_other_name(data: bytes, place: int, name: bytes) -> bytes:
    """Put another name in the place of one of the short names of a tree, which are msgpack's bin 8."""
    ends = [i for i in range(len(data) - 3) if data[i] == 0xC4 and 0 < data[i + 1] < 9]
    if not ends:
        return data
    at = ends[place % len(ends)]
    return data[:at] + b"\xc4" + bytes([len(name) % 256]) + name + data[at + 2 + data[at + 1] :]


def _forge_snapshot(
    repository: Repository, name: str, old: bytes, new: Digest, edits: list[Edit]
) -> None:
    path = Path(str(repository.place)) / "snapshots" / name
    data = path.read_bytes()
    magic, version, codec, zero, plain_bytes = HEADER.unpack(data[: HEADER.size])
    payload = data[HEADER.size :]
    plain = repository.codec.decompress(codec, payload, plain_bytes).replace(old, new)
    for edit in edits:
        plain = edit.apply(plain)[: 1 << 20]
    header = HEADER.pack(magic, version, 0, zero, len(plain))
    forged = header + plain
    snapshot_id = SnapshotId(digest_of(forged))
    if not edits:
        assert decode_snapshot(snapshot_id, forged, repository.codec).host == "here"
    path.unlink()
    path.with_name(snapshot_id.hex()).write_bytes(forged)
