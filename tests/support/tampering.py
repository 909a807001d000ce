"""An encrypted repository on a hostile storage: what there is to change, and ways to change it.

The owner of the storage can also name a changed object by its new digest, so that nothing looks wrong
without a key; that is what `RENAMED` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from casfs.digest import digest_of
from casfs.format.pack import BLOB_HEADER, PACK_PREFIXES, SESSION_HEADER, TRAILER
from casfs.repository.place import read_config
from tests.support.encryption import PUBLIC, SECRET
from tests.support.observation import Files, look_at_source
from tests.support.process_runner import KIB, Stage
from tests.support.stores import noise

PASSPHRASE = "correct horse"


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a command ended and what it said."""

    exit: int
    out: str
    err: str


@dataclass(slots=True)
class Hostile:
    """A repository in a folder, with the homes of a host that writes to it and of a reader."""

    stage: Stage
    folder: Path
    published: dict[str, Files] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.folder / "repository"

    @property
    def source(self) -> Path:
        return self.folder / "source"

    def run(self, *arguments: str | Path, home: str, stdin: str = "") -> CommandResult:
        """Run a command; one that fails has said so in a sentence."""
        where = self.folder / home
        where.mkdir(exist_ok=True)
        words = [str(one) for one in arguments]
        reported = self.stage.act(
            "command", self.root, arguments=words, home=str(where), stdin=stdin
        ).done()
        printed = CommandResult(**reported)
        assert "Traceback" not in printed.out + printed.err, printed
        assert printed.exit in (0, 1, 5), printed
        if printed.exit:
            assert len((printed.err + printed.out).split()) >= 3, printed
        return printed

    def back_up(self, *more: str) -> CommandResult:
        """Back up as the host that cannot read; remember what a snapshot that came of it shows."""
        before = set(os.listdir(self.root / "snapshots"))
        printed = self.run("backup", "--no-sync", self.source, *more, home="writer")
        for name in set(os.listdir(self.root / "snapshots")) - before:
            self.published[name] = look_at_source(self.source)
        return printed

    def identity(self) -> tuple[str, Path]:
        return "--identity", self.folder / "identity"

    def look(self, home: str) -> dict[str, dict[str, Files]] | None:
        """Return the entries as read and as mounted, or None where that was refused."""
        where = self.folder / home
        where.mkdir(exist_ok=True)
        reported = self.stage.act("look_with_a_key", self.root, secret=SECRET, home=str(where))
        assert reported.exit == 0, reported
        seen: dict[str, dict[str, Files]] | None = reported.result
        assert seen is not None or (
            reported.error is not None and reported.error["exit"] in (1, 5)
        ), reported
        return seen

    def objects(self, folder: str) -> list[Path]:
        """Return the files of a kind, the newest last."""
        folders = PACK_PREFIXES if folder == "packs" else (folder,)
        found = [
            path for name in folders for path in (self.root / name).rglob("*") if path.is_file()
        ]
        return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def make_hostile(stage: Stage, folder: Path) -> Hostile:
    """Make a repository with two snapshots, of which each has packs of its own."""
    made = Hostile(stage, folder)
    (made.source / "a").mkdir(parents=True)
    (folder / "identity").write_text(SECRET + "\n")
    for number in range(4):
        (made.source / "a" / str(number)).write_bytes(noise(f"a {number}", 12 * KIB))
    passphrase = ("--passphrase", "--passphrase-fd", "0")
    printed = made.run("init", "--recipient", PUBLIC, *passphrase, home="writer", stdin=PASSPHRASE)
    assert printed.exit == 0, printed
    assert made.back_up().exit == 0
    for number in range(3):
        (made.source / "a" / str(number)).write_bytes(noise(f"b {number}", 15 * KIB))
    assert made.back_up().exit == 0
    assert len(made.published) == 2
    # A reader that has seen the intact repository before.
    assert made.run("check", *made.identity(), home="knowing").exit == 0
    return made


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of an object."""

    path: Path
    begin: int
    end: int


def parts_of(hostile: Hostile) -> dict[str, Part]:
    """Return the parts of objects that can be changed, by kind."""
    root = hostile.root
    config = read_config(root)
    assert config.encryption is not None
    first = root / "sessions" / config.encryption.session
    sessions = hostile.objects("sessions")
    (identity,) = hostile.objects("identities")
    pack, snapshot = hostile.objects("packs")[-1], hostile.objects("snapshots")[-1]
    size = pack.stat().st_size
    directory = int.from_bytes(pack.read_bytes()[-TRAILER.size : -TRAILER.size + 8], "little")

    def whole(path: Path) -> Part:
        return Part(path, 0, path.stat().st_size)

    return {
        "the configuration": whole(root / "config"),
        "the list of recipients": whole(root / "recipients"),
        "the first session": whole(next(first.iterdir())),
        "the last session": whole(sessions[-1]),
        "the identity of the passphrase": whole(identity),
        "the header of a pack": Part(pack, 0, SESSION_HEADER),
        "the records of a pack": Part(pack, SESSION_HEADER, directory - BLOB_HEADER.size),
        "the directory of a pack": Part(pack, directory, size - TRAILER.size),
        "the trailer of a pack": Part(pack, size - TRAILER.size, size),
        "the header of a snapshot": Part(snapshot, 0, 16),
        "the envelope of a snapshot": Part(snapshot, 16, 104),
        "the payload of a snapshot": Part(snapshot, 104, snapshot.stat().st_size),
    }


def _flip(place: int) -> Callable[[bytes, Part, bytes], bytes]:
    """Return a function that flips a bit at a share, in hundredths, of the part."""

    def change(data: bytes, part: Part, other: bytes) -> bytes:
        at = part.begin + (part.end - 1 - part.begin) * place // 100
        return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]

    return change


def _cut(data: bytes, part: Part, other: bytes) -> bytes:
    return data[: (part.begin + part.end) // 2]


def _replaced(data: bytes, part: Part, other: bytes) -> bytes:
    return other


FLIPS: dict[str, Any] = {f"with a bit flipped at {place} %": _flip(place) for place in (0, 45, 100)}
CHANGES: dict[str, Any] = {
    **FLIPS,
    "cut": _cut,
    "in the place of which another of the repository stands": _replaced,
    "in the place of which one of another repository stands": _replaced,
}
RENAMED = ", renamed to its digest"


def tamper(part: Part, what: str, other: bytes) -> Path:
    """Change an object; returns where it is then."""
    data = CHANGES[what.removesuffix(RENAMED)](part.path.read_bytes(), part, other)
    part.path.write_bytes(data)
    if not what.endswith(RENAMED):
        return part.path
    _, dot, suffix = part.path.name.partition(".")
    new = digest_of(data).hex()
    folder = part.path.parent
    if folder.parent.name in PACK_PREFIXES:
        folder = folder.parent / new[:2]
        folder.mkdir(exist_ok=True)
    return part.path.rename(folder / (new + dot + suffix))
