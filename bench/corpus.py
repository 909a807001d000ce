"""The files that are backed up: a real tree of this machine, and synthetic ones.

Every run creates its corpora in the scratch folder, the real tree as a copy, so that it is on one known file
system and does not change. Synthetic corpora are the same on every machine. `change` brings a corpus to its
next state in place. All programs are measured on one state before the next one is made.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.content import BLOCK_BYTES, TextStream, random_blocks
from bench.records import CorpusFacts

REAL_SOURCES = ("/usr/share", "/usr/include", "/usr/lib/python3", "/usr/lib/gcc")
REAL_REST = "/usr/lib"
IMAGE_BLOCK_BYTES = 4096
IMAGE_CHANGED_BLOCKS = 50
CHURN = 0.01
DAYS = 20


@dataclass(frozen=True, slots=True)
class Scale:
    """The sizes of the corpora."""

    real_files: int
    small_files: int
    million_files: int
    daily_files: int
    big_bytes: int
    incompressible_bytes: int
    image_bytes: int


FULL = Scale(
    real_files=55_000,
    small_files=30_000,
    million_files=1_000_000,
    daily_files=10_000,
    big_bytes=2_000_000_000,
    incompressible_bytes=1_000_000_000,
    image_bytes=1 << 30,
)
QUICK = Scale(
    real_files=3_000,
    small_files=2_000,
    million_files=5_000,
    daily_files=500,
    big_bytes=100_000_000,
    incompressible_bytes=50_000_000,
    image_bytes=1 << 26,
)


@dataclass(frozen=True, slots=True)
class Corpus:
    """How to make one corpus.

    `build` fills an empty folder and returns a description. `change` is None if the corpus has only one
    state. `single` is the name of the file in a corpus of one file.
    """

    name: str
    build: Callable[[Path, Scale], str]
    estimate: Callable[[Scale], tuple[int, int]]
    single: str | None = None
    change: Callable[[Path, int], None] | None = None


def survey(name: str, description: str, folder: Path) -> CorpusFacts:
    """Count the entries below `folder`, without the folder itself."""
    files = entries = file_bytes = 0
    for entry in _walk(folder):
        entries += 1
        if entry.is_file(follow_symlinks=False):
            files += 1
            file_bytes += entry.stat(follow_symlinks=False).st_size
    return CorpusFacts(name, description, files, entries, file_bytes)


def warm(folder: Path) -> None:
    """Read everything below `folder`, so that later reads come from the kernel's cache."""
    for entry in _walk(folder):
        if entry.is_file(follow_symlinks=False):
            descriptor = os.open(entry.path, os.O_RDONLY)
            try:
                while os.read(descriptor, BLOCK_BYTES):
                    pass
            finally:
                os.close(descriptor)


def touch(folder: Path) -> None:
    """Give every regular file a new modification time without changing its content."""
    for entry in _walk(folder):
        if entry.is_file(follow_symlinks=False):
            stat = entry.stat(follow_symlinks=False)
            os.utime(entry.path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_007))


def stored_bytes(folder: Path) -> int:
    """Return the bytes of the regular files below a repository, without holes."""
    total = 0
    for entry in _walk(folder):
        if entry.is_file(follow_symlinks=False):
            stat = entry.stat(follow_symlinks=False)
            total += min(stat.st_size, stat.st_blocks * 512)
    return total


def _walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    pending = [os.fspath(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                yield entry


def _build_real(folder: Path, scale: Scale) -> str:
    taken: list[str] = []
    files = 0
    for source in _real_sources(scale):
        if files >= scale.real_files:
            break
        target = folder / source.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", "--one-file-system", source, target], check=True)
        files += sum(1 for entry in _walk(target) if entry.is_file(follow_symlinks=False))
        taken.append(source)
    return f"a copy of this machine's {', '.join(taken)}"


def _real_sources(scale: Scale) -> Iterator[str]:
    """Yield folders to copy until there are enough files; none is inside another."""
    # Where few files are wanted, the folder with the most comes last.
    first = REAL_SOURCES if scale is FULL else tuple(reversed(REAL_SOURCES))
    yield from filter(os.path.isdir, first)
    with os.scandir(REAL_REST) as entries:
        names = sorted(each.path for each in entries if each.is_dir(follow_symlinks=False))
    yield from (name for name in names if name not in REAL_SOURCES)


def _estimate_real(scale: Scale) -> tuple[int, int]:
    return 30_000 * scale.real_files, 2 * scale.real_files


def _build_many(folder: Path, files: int, mean_bytes: int, seed: str) -> None:
    rng = random.Random(seed)
    text = TextStream(seed)
    for first in range(0, files, 100):
        parent = folder / f"{first // 10_000:03}" / f"{first // 100 % 100:02}"
        parent.mkdir(parents=True)
        for number in range(first, min(first + 100, files)):
            # The mean of this distribution is 1.65.
            size = int(rng.lognormvariate(0, 1) / 1.65 * mean_bytes)
            with open(f"{parent}/{number:07}.txt", "wb") as stream:
                stream.write(text.take(size))


def _build_small(folder: Path, scale: Scale) -> str:
    _build_many(folder, scale.small_files, 6_000, "small")
    return "text files of 6 kB on average, 100 in a folder, synthetic"


def _build_million(folder: Path, scale: Scale) -> str:
    _build_many(folder, scale.million_files, 400, "million")
    return "text files of 400 bytes on average, 100 in a folder, synthetic"


def _build_daily(folder: Path, scale: Scale) -> str:
    _build_many(folder, scale.daily_files, 16_000, "daily")
    return (
        f"text files of 16 kB on average, {CHURN:.0%} of them rewritten, added or removed each "
        f"day for {DAYS} days, synthetic"
    )


def _change_daily(folder: Path, number: int) -> None:
    rng = random.Random(f"daily {number}")
    text = TextStream(f"daily {number}")
    names = sorted(entry.path for entry in _walk(folder) if entry.is_file())
    chosen = rng.sample(names, max(3, int(len(names) * CHURN)))
    for place, name in enumerate(chosen):
        size = os.stat(name).st_size
        if place % 10 == 0:
            os.unlink(name)
        elif place % 10 == 1:
            Path(f"{name}.day{number}").write_bytes(text.take(size))
        else:
            Path(name).write_bytes(text.take(size))


def _build_big(folder: Path, scale: Scale) -> str:
    text = TextStream("big")
    with (folder / "big.txt").open("wb") as stream:
        for start in range(0, scale.big_bytes, BLOCK_BYTES):
            stream.write(text.take(min(BLOCK_BYTES, scale.big_bytes - start)))
    return "one compressible file, synthetic, without a period"


def _build_incompressible(folder: Path, scale: Scale) -> str:
    with (folder / "random.bin").open("wb") as stream:
        stream.writelines(random_blocks("incompressible", scale.incompressible_bytes))
    return "one file of random bytes, synthetic"


def _build_image(folder: Path, scale: Scale) -> str:
    rng = random.Random("image")
    text = TextStream("image")
    extent_bytes = 1 << 16
    with (folder / "disk.img").open("wb") as stream:
        for _ in range(scale.image_bytes // extent_bytes):
            kind = rng.random()
            if kind < 0.4:
                stream.write(text.take(extent_bytes))
            elif kind < 0.7:
                stream.write(rng.randbytes(extent_bytes))
            else:
                stream.write(bytes(extent_bytes))
    return (
        "a disk image of text, random bytes and zeros, of which "
        f"{IMAGE_CHANGED_BLOCKS} random blocks of 4 KiB change, synthetic"
    )


def _change_image(folder: Path, number: int) -> None:
    rng = random.Random(f"image {number}")
    with (folder / "disk.img").open("r+b") as stream:
        blocks = os.fstat(stream.fileno()).st_size // IMAGE_BLOCK_BYTES
        for block in rng.sample(range(blocks), IMAGE_CHANGED_BLOCKS):
            stream.seek(block * IMAGE_BLOCK_BYTES)
            stream.write(rng.randbytes(IMAGE_BLOCK_BYTES))


CORPORA = (
    Corpus("real", _build_real, _estimate_real),
    Corpus("big", _build_big, lambda scale: (scale.big_bytes, 10), single="big.txt"),
    Corpus(
        "small",
        _build_small,
        lambda scale: (10_000 * scale.small_files, 2 * scale.small_files),
    ),
    Corpus(
        "incompressible",
        _build_incompressible,
        lambda scale: (scale.incompressible_bytes, 10),
        single="random.bin",
    ),
    Corpus(
        "image",
        _build_image,
        lambda scale: (scale.image_bytes, 10),
        single="disk.img",
        change=_change_image,
    ),
    Corpus(
        "million",
        _build_million,
        lambda scale: (4_500 * scale.million_files, 2 * scale.million_files),
    ),
    Corpus(
        "daily",
        _build_daily,
        lambda scale: (30_000 * scale.daily_files, 2 * scale.daily_files),
        change=_change_daily,
    ),
)
