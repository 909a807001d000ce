"""Measure whether the time per file and per blob grows with their number: `python -m bench growth`.

Trees of ten thousand to a million small files are backed up, backed up again and checked; an index of up to
twenty million blobs is made without their data and asked. Written as growth.json and growth.svg.
"""

from __future__ import annotations

import random
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from blake3 import blake3

from bench.corpus import CORPORA, FULL
from bench.growthchart import render_growth
from bench.measure import Command, run
from bench.peers.casfs import Casfs, find_program
from bench.scratch import Scratch
from bench.stage import WORK_TIMEOUT_S
from casfs.digest import Digest, PackId
from casfs.format.pack import PackEntry, PackRef
from casfs.index.index import Index
from casfs.store.pack_builder import PACK_BLOBS

FILES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
BLOBS = (100_000, 1_000_000, 5_000_000, 20_000_000)
QUICK_FILES = (500, 1_000, 2_000)
QUICK_BLOBS = (20_000, 200_000)

_ASKED = 100_000
_AT_ONCE = 512
"""Digests in one lookup, as in a backup."""

_BYTES_PER_FILE = 4_500
_BYTES_PER_BLOB = 150
_STEP = struct.Struct(">Q")


class Point(msgspec.Struct, frozen=True):
    """One measured value: the action, the number of files or blobs, and the cost of each of them."""

    what: str
    count: int
    each_us: float
    wall_s: float
    cpu_s: float = 0.0
    peak_bytes: int = 0

    def line(self) -> str:
        """Return the value as a line of text."""
        peak = f"{self.peak_bytes / 1e6:6.0f} MB" if self.peak_bytes else ""
        return f"{self.what:<24} {self.count:>12,} {self.each_us:9.2f} µs each {peak}"


@dataclass(frozen=True, slots=True)
class _Program:
    """The installed command on one tree."""

    casfs: Casfs
    home: Path
    source: Path
    log: Path

    def points(self, count: int) -> Iterator[Point]:
        """Back up for the first time, then with nothing changed, then check."""
        run(self.casfs.initialise(self.home), self.log, WORK_TIMEOUT_S)
        works = (
            ("first backup", self.casfs.backup(self.home, self.source, "1")),
            ("nothing changed", self.casfs.backup(self.home, self.source, "2")),
            ("check, all data read", self.casfs.check(self.home)),
        )
        for what, command in works:
            yield self._point(what, count, command)

    def _point(self, what: str, count: int, command: Command) -> Point:
        usage = run(command, self.log, WORK_TIMEOUT_S)
        each_us = usage.cpu_s / count * 1e6
        return Point(what, count, each_us, usage.wall_s, usage.cpu_s, usage.peak_bytes)


def measure_growth(root: Path, output: Path, quick: bool) -> int:
    """Measure, print every point, write both files, and return an exit code."""
    program = find_program()
    if program is None:
        print("casfs is not installed: run make dev.", file=sys.stderr)
        return 1
    files, blobs = (QUICK_FILES, QUICK_BLOBS) if quick else (FILES, BLOBS)
    points: list[Point] = []
    with Scratch(root) as scratch:
        scratch.need(
            max(_BYTES_PER_FILE * files[-1], _BYTES_PER_BLOB * blobs[-1]),
            2 * files[-1],
            "The largest tree",
        )
        for point in (*_of_files(scratch, program, files), *_of_lookups(scratch, blobs)):
            points.append(point)
    output.mkdir(parents=True, exist_ok=True)
    (output / "growth.json").write_bytes(msgspec.json.format(msgspec.json.encode(points)))
    lines: dict[str, list[tuple[int, float]]] = {}
    for point in points:
        lines.setdefault(point.what, []).append((point.count, point.each_us))
    (output / "growth.svg").write_text(render_growth(lines), encoding="utf-8")
    print(f"Written to {output}: growth.json, growth.svg")
    return 0


def _of_files(scratch: Scratch, program: str, counts: tuple[int, ...]) -> Iterator[Point]:
    build = next(each.build for each in CORPORA if each.name == "million")
    for count in counts:
        folder = scratch.make(f"files-{count}")
        source, home = folder / "source", folder / "home"
        for each in (source, home):
            each.mkdir()
        build(source, replace(FULL, million_files=count))
        work = _Program(Casfs(program), home, source, scratch.folder / "output.log")
        for point in work.points(count):
            print(point.line(), flush=True)
            yield point
        scratch.remove(folder)


def _of_lookups(scratch: Scratch, counts: tuple[int, ...]) -> Iterator[Point]:
    folder = scratch.make("index")
    index = Index(folder, sync=False)
    try:
        index.rebuild(tuple)
        rounds: list[int] = []
        for count in counts:
            added = count - sum(rounds)
            # The digests of different rounds lie between one another, as those of different packs do.
            _grow(index, len(rounds), added)
            rounds.append(added)
            yield from _asked(index, count, rounds)
    finally:
        index.close()
        scratch.remove(folder)


def _grow(index: Index, round_number: int, count: int) -> None:
    """Add blobs in the order of their digests, which builds a large index quickly and at full size."""
    for begin in range(0, count, PACK_BLOBS):
        numbers = range(begin, min(begin + PACK_BLOBS, count))
        entries = [
            PackEntry(made_digest(round_number, number, count), 16, 100, 300, 1, 1)
            for number in numbers
        ]
        name = PackId(blake3(b"%d %d" % (round_number, begin)).digest())
        index.add_packs([(PackRef(name, False), 1 << 26, entries)])


def made_digest(round_number: int, number: int, count: int) -> Digest:
    """Return the digest of a blob that does not exist; digests grow with the number."""
    place = (number * (1 << 64) + (1 << 63)) // count
    return Digest(_STEP.pack(place) + blake3(b"%d %d" % (round_number, number)).digest()[8:])


def _asked(index: Index, count: int, rounds: list[int]) -> Iterator[Point]:
    rng = random.Random(count)
    there = [
        made_digest(which, rng.randrange(rounds[which]), rounds[which])
        for which in rng.choices(range(len(rounds)), rounds, k=_ASKED)
    ]
    missing = [Digest(rng.randbytes(32)) for _ in range(_ASKED)]
    for what, digests, found in (
        ("look up, stored", there, True),
        ("look up, new", missing, False),
    ):
        began = time.perf_counter()
        for begin in range(0, _ASKED, _AT_ONCE):
            if index.are_stored(digests[begin : begin + _AT_ONCE]).count(found) == 0:
                raise ValueError(f"the index of {count} blobs does not know what is in it")
        wall_s = time.perf_counter() - began
        point = Point(what, count, wall_s / _ASKED * 1e6, wall_s)
        print(point.line(), flush=True)
        yield point
