"""What a storage, and a thief of a host that cannot read, find of the files: nothing.

Every byte of the repository, and of what the host keeps for itself, is searched for the names, contents
and circumstances of a source, as they are and in every compressed frame that is found.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3

from casfs.digest import digest_of
from tests.support.cli import Casfs, finish, program
from tests.support.key_tools import made_keys
from tests.support.stored_objects import StoredObjects
from tests.support.waiting import wait_until

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MTIME_NS = 1_234_567_890_123_456_789

CONTENT = b"the content of the quixotic letter, which nobody else has written\n"
NAMES = (b"zephyrfolder", b"quixotic-letter", b"jackdaw\xff\xfename", b"sphinxlink", b"wizardfifo")
CIRCUMSTANCES = (
    CONTENT,
    b"vexing-target/of/a/link",
    b"user.fjordattribute",
    b"the value of waltzing",
    b"backuphost-glyph",
    b"tag-quartz",
    b"secondtag-onyx",
)


def fill(source: Path) -> dict[str, bytes]:
    """Make a source of distinctive texts; return those that must be found nowhere, by kind."""
    inside = source / "zephyrfolder"
    inside.mkdir(parents=True)
    files = {
        b"quixotic-letter": CONTENT,
        b"jackdaw\xff\xfename": CONTENT * 500,
        b"noise": os.urandom(3_000_000),
        b"text": b"".join(b"line %d of the letter\n" % n for n in range(200_000)),
    }
    found: dict[str, bytes] = {}
    for name, data in files.items():
        path = os.fsencode(inside) + b"/" + name
        with open(path, "wb") as file:
            file.write(data)
        os.utime(path, ns=(0, MTIME_NS))
        for piece in (data, data[: 1 << 20]):
            digest = blake3(piece).digest()
            found[f"digest of {len(piece)} bytes of {name!r}"] = digest
            found[f"digest in hex of {len(piece)} bytes of {name!r}"] = digest.hex().encode()
        found[f"beginning of {name!r}"] = data[:40]
        found[f"middle of {name!r}"] = data[len(data) // 2 :][:40]
    os.setxattr(inside / "quixotic-letter", "user.fjordattribute", b"the value of waltzing")
    (inside / "sphinxlink").symlink_to("vexing-target/of/a/link")
    os.mkfifo(inside / "wizardfifo")
    found |= {str(one): one for one in (*NAMES, *CIRCUMSTANCES, b"stdinsecretname")}
    found["mtime, little endian"] = MTIME_NS.to_bytes(8, "little")
    found["mtime, big endian"] = MTIME_NS.to_bytes(8, "big")
    return found


def frames(data: bytes) -> Iterable[bytes]:
    """Yield what is in every compressed frame that there is, and that looks like one."""
    for match in re.finditer(re.escape(ZSTD_MAGIC), data):
        try:
            reader = zstandard.ZstdDecompressor().stream_reader(data[match.start() :])
            yield reader.read(16 << 20)
        except zstandard.ZstdError:
            continue


def found_in(places: Iterable[Path], secrets: dict[str, bytes]) -> list[tuple[str, str]]:
    """Return which secret is in which file, in its bytes, its name, or a frame in it."""
    found = []
    for place in places:
        for path in place.rglob("*"):
            try:
                data = path.read_bytes() if path.is_file() else b""
            except FileNotFoundError:
                continue
            for text in (os.fsencode(path.relative_to(place)), data, *frames(data)):
                found += [(str(path), what) for what, secret in secrets.items() if secret in text]
    return found


@pytest.fixture
def secrets(tmp_path: Path) -> dict[str, bytes]:
    return fill(tmp_path / "source")


@pytest.mark.parametrize("encrypted", [True, False])
def test_no_source_text_is_found_in_the_repository_or_in_the_state_of_the_host(
    casfs: Casfs, tmp_path: Path, secrets: dict[str, bytes], encrypted: bool
) -> None:
    source = tmp_path / "source"
    with made_keys() as keys:
        recipient = ("--recipient", keys.age_public) if encrypted else ()
        casfs.run("init", *recipient)
        options = ("--host", "backuphost-glyph", "--tag", "tag-quartz")
        casfs.backup(source, *options)
        (source / "zephyrfolder" / "noise").write_bytes(os.urandom(2_000_000))
        casfs.backup(source, *options, "--tag", "secondtag-onyx")
        stored = StoredObjects(casfs)
        found = found_in([stored.files(tmp_path / "stored"), casfs.home], secrets)
        if not encrypted:
            # The search finds what there is: so it is shown that it can.
            reported = {what for _, what in found}
            assert {str(one) for one in (*NAMES[:4], *CIRCUMSTANCES)} <= reported
            assert "beginning of b'noise'" in reported
            assert f"digest of {len(CONTENT)} bytes of b'quixotic-letter'" in reported
            assert {f"mtime, {order} endian" for order in ("little", "big")} & reported
            return
        assert found == []
        # All of it is there for who has the key.
        casfs.run("restore", "latest", "--target", tmp_path / "out", "--identity", keys.age)
        (letter,) = (tmp_path / "out").rglob("quixotic-letter")
        assert letter.read_bytes() == CONTENT
        assert digest_of(letter.read_bytes()) in secrets.values()
        # Nor does a reader leave anything where the storage sees it.
        for verb in (
            ("check", "--read-data"),
            ("prune",),
            ("tag", "latest", "--set", "tag-quartz"),
        ):
            casfs.run(*verb, "--identity", keys.age)
        assert found_in([stored.files(tmp_path / "stored again")], secrets) == []


def test_no_source_text_is_found_during_a_backup_or_after_a_kill(
    casfs: Casfs, secrets: dict[str, bytes]
) -> None:
    with made_keys() as keys:
        casfs.run("init", "--recipient", keys.age_public)
    assert casfs.repository is not None
    words = ("backup", "--stdin", "--stdin-name", "stdinsecretname", "--tag", "tag-quartz")
    running = subprocess.Popen(
        [os.fsencode(one) for one in (*program(), *words, "--host", "backuphost-glyph")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=casfs.environment(),
        cwd=casfs.home,
    )
    spool = casfs.repository / "tmp"
    try:
        assert running.stdin is not None
        running.stdin.write(CONTENT * 1000 + os.urandom(20_000_000))
        running.stdin.flush()
        wait_until(
            lambda: sum(path.stat().st_size for path in spool.iterdir()) > 1_000_000,
            "a part of a pack is in the spool",
        )
        assert list((casfs.repository / "locks").iterdir())
        assert found_in([casfs.repository, casfs.home], secrets) == []
    finally:
        running.kill()
        finish(running)
    assert found_in([casfs.repository, casfs.home], secrets) == []
