"""Chance damage to any object of a repository, and objects that come back from its past.

What was there once is remembered, so that older states can come back as by a backup of the repository
that was copied over it in part: an index with its fingerprint or without, removal notices, packs that a prune
removed, snapshots that were forgotten. Objects are chosen by the order in which they appeared:
their names depend on the time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from casfs.format.pack import HEADER, PACK_PREFIXES, TRAILER
from casfs.index.fingerprint import FINGERPRINT_FILE

MOST = 1 << 16
"""What a choice is below."""

FOLDERS = {
    "sessions": ("sessions",),
    "packs": PACK_PREFIXES,
    "snapshots": ("snapshots",),
    "condemned": ("condemned",),
}
"""The kinds of objects, with the folders in which they lie."""

DATA = "data.mdb"


class Past:
    """All that a repository has held so far; `indexes` is where those of its users lie."""

    def __init__(self, root: Path, *indexes: Path) -> None:
        self.root = root
        self.indexes = indexes
        self._objects: dict[str, dict[Path, bytes]] = {folder: {} for folder in FOLDERS}
        self._states: dict[Path, list[dict[str, tuple[bytes, int]]]] = {one: [] for one in indexes}

    def remember(self) -> None:
        """Keep what is new; an object is remembered as it was when it was seen first."""
        for kind, known in self._objects.items():
            paths = [
                path
                for folder in FOLDERS[kind]
                for path in (self.root / folder).rglob("*")
                if path.is_file()
            ]
            for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name)):
                if path not in known:
                    known[path] = path.read_bytes()
        for index, states in self._states.items():
            state = {
                name: ((index / name).read_bytes(), (index / name).stat().st_mtime_ns)
                for name in (DATA, FINGERPRINT_FILE)
                if (index / name).exists()
            }
            if state and state not in states[-1:]:
                states.append(state)

    def there(self, folder: str) -> list[Path]:
        """Return the objects of a kind that are there, in the order in which they appeared."""
        return [path for path in self._objects[folder] if path.exists()]

    def gone(self, folder: str) -> list[Path]:
        """Return the objects of a kind that are there no more."""
        return [path for path in self._objects[folder] if not path.exists()]

    def changed(self, folder: str) -> list[Path]:
        """Return the objects of a kind that are there and not as they were."""
        known = self._objects[folder]
        return [path for path in self.there(folder) if path.read_bytes() != known[path]]

    def bring_back(self, path: Path) -> None:
        """Restore an object to its first state.

        The keys with which something of it was encrypted come with it. A prune removes those that
        nothing needs, and a pack that comes without them would stay for ever: its content
        is unknown.
        """
        for one in (path, *self.gone("sessions")):
            one.parent.mkdir(exist_ok=True)
            one.write_bytes(next(known[one] for known in self._objects.values() if one in known))

    def an_index(self, where: int) -> Path:
        """Return where one of the indexes lies."""
        return self.indexes[where % len(self.indexes)]

    def roll_index_back(self, index: Path, which: int, names: tuple[str, ...]) -> None:
        """Restore files of an index to an earlier state, to the nanosecond."""
        states = self._states[index]
        state = states[which % len(states)] if states else {}
        for name in names:
            if name in state:
                data, mtime_ns = state[name]
                (index / name).write_bytes(data)
                os.utime(index / name, ns=(mtime_ns, mtime_ns))


Hurt = Callable[[Past, int, int], bool]
"""Does harm that is chosen by two numbers; returns whether there was anything to harm."""


def _place(data: bytes, which: int) -> int:
    """Return a place in a pack: one in four is in the header, in the directory or in the trailer."""
    directory = int.from_bytes(data[-TRAILER.size : -TRAILER.size + 8], "little")
    if which % 4 or len(data) < HEADER.size + TRAILER.size or directory >= len(data):
        return which * len(data) // MOST
    begin, end = [
        (0, HEADER.size),
        (directory, len(data) - TRAILER.size),
        (len(data) - TRAILER.size, len(data)),
    ][which // 4 % 3]
    return begin + (which // 12) % (end - begin)


def _changing(folder: str, change: Callable[[bytes, int], bytes]) -> Hurt:
    def hurt(past: Past, which: int, where: int) -> bool:
        paths = past.there(folder)
        if not paths:
            return False
        path = paths[which % len(paths)]
        data = path.read_bytes()
        path.write_bytes(change(data, _place(data, where)) if data else b"")
        return True

    return hurt


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def _zero(data: bytes, at: int) -> bytes:
    length = min(4096, len(data) - at)
    return data[:at] + bytes(length) + data[at + length :]


def _cut(data: bytes, at: int) -> bytes:
    return data[:at]


def _append(data: bytes, at: int) -> bytes:
    return data + data[at : at + 1000]


def _two(past: Past, folder: str, which: int, where: int) -> tuple[Path, Path] | None:
    paths = past.there(folder)
    if len(paths) < 2:
        return None
    path = paths.pop(which % len(paths))
    return path, paths[where % len(paths)]


def _swapping(folder: str) -> Hurt:
    def hurt(past: Past, which: int, where: int) -> bool:
        pair = _two(past, folder, which, where)
        if pair is not None:
            first, second = (path.read_bytes() for path in pair)
            pair[0].write_bytes(second)
            pair[1].write_bytes(first)
        return pair is not None

    return hurt


def _copying(folder: str) -> Hurt:
    def hurt(past: Past, which: int, where: int) -> bool:
        pair = _two(past, folder, which, where)
        if pair is not None:
            pair[0].write_bytes(pair[1].read_bytes())
        return pair is not None

    return hurt


def _removing(folder: str) -> Hurt:
    def hurt(past: Past, which: int, where: int) -> bool:
        paths = past.there(folder)
        if paths:
            paths[which % len(paths)].unlink()
        return bool(paths)

    return hurt


def _bringing_back(folder: str, find: Callable[[Past, str], list[Path]], every: bool) -> Hurt:
    def hurt(past: Past, which: int, where: int) -> bool:
        paths = find(past, folder)
        for path in paths if every else paths[which % max(len(paths), 1) :][:1]:
            past.bring_back(path)
        return bool(paths)

    return hurt


def _rolling_back(*names: str) -> Hurt:
    def hurt(past: Past, which: int, where: int) -> bool:
        past.roll_index_back(past.an_index(where), which, names)
        return True

    return hurt


def _removing_from_index(*names: str) -> Hurt:
    def hurt(past: Past, which: int, where: int) -> bool:
        for name in names:
            (past.an_index(where) / name).unlink(missing_ok=True)
        return True

    return hurt


def _changing_index(name: str, change: Callable[[bytes, int], bytes]) -> Hurt:
    def hurt(past: Past, which: int, where: int) -> bool:
        path = past.an_index(which) / name
        if path.exists() and (data := path.read_bytes()):
            path.write_bytes(change(data, where * len(data) // MOST))
            return True
        return False

    return hurt


HURTS: dict[str, tuple[int, Hurt]] = {
    "a bit of a pack flips": (4, _changing("packs", _flip)),
    "a block of a pack is zeroed": (3, _changing("packs", _zero)),
    "a pack is cut": (2, _changing("packs", _cut)),
    "a pack grows": (1, _changing("packs", _append)),
    "two packs change places": (6, _swapping("packs")),
    "a pack is copied over another": (6, _copying("packs")),
    "a pack vanishes": (3, _removing("packs")),
    "a pack that was removed comes back": (3, _bringing_back("packs", Past.gone, every=False)),
    "all packs that were removed come back": (1, _bringing_back("packs", Past.gone, every=True)),
    "a damaged pack is as it was": (2, _bringing_back("packs", Past.changed, every=False)),
    "the index is an older one": (4, _rolling_back(DATA, FINGERPRINT_FILE)),
    "the index is an older one under its new seal": (2, _rolling_back(DATA)),
    "the seal is an older one": (1, _rolling_back(FINGERPRINT_FILE)),
    "the index vanishes": (2, _removing_from_index(DATA, FINGERPRINT_FILE)),
    "the data of the index vanish": (1, _removing_from_index(DATA)),
    "the seal vanishes": (1, _removing_from_index(FINGERPRINT_FILE)),
    "a bit of the index flips": (1, _changing_index(DATA, _flip)),
    "a block of the index is zeroed": (1, _changing_index(DATA, _zero)),
    "a bit of the seal flips": (1, _changing_index(FINGERPRINT_FILE, _flip)),
    "a condemnation vanishes": (3, _removing("condemned")),
    "a condemnation is damaged": (1, _changing("condemned", _flip)),
    "a condemnation comes back": (3, _bringing_back("condemned", Past.gone, every=False)),
    "all condemnations come back": (2, _bringing_back("condemned", Past.gone, every=True)),
    "two snapshots change places": (1, _swapping("snapshots")),
    "a bit of a snapshot flips": (1, _changing("snapshots", _flip)),
    "a snapshot vanishes": (1, _removing("snapshots")),
    "a snapshot comes back": (2, _bringing_back("snapshots", Past.gone, every=False)),
}
"""Each kind of harm with how often it is chosen."""

INDEX_HURTS = frozenset(
    name for name in HURTS if ("index" in name or "seal" in name) and "comes back" not in name
)
