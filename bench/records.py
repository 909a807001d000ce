"""The results of a run, and their JSON form.

Every single repetition is kept as a `Sample`; medians and ratios are made when they are shown.
Records are immutable. Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

JSON_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured repetition of one work by one program.

    `peak_bytes` is the largest process of the tree, or the server of a mount; `foreign_cpu_s` is
    the processor time that the machine spent meanwhile on anything else, so that a disturbed
    measurement can be distinguished from a slow program. `day_*` are filled by the daily work only.
    """

    corpus: str
    work: str
    program: str
    repetition: int
    wall_s: float
    cpu_s: float
    peak_bytes: int
    foreign_cpu_s: float
    stored_bytes: int | None = None
    cache_bytes: int | None = None
    grown_bytes: int | None = None
    work_bytes: int | None = None
    day_wall_s: tuple[float, ...] = ()
    day_grown_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CorpusFacts:
    """The measured size of a corpus on this machine."""

    name: str
    description: str
    files: int
    entries: int
    file_bytes: int


@dataclass(frozen=True, slots=True)
class ProgramFacts:
    """A program that took part, with the version that it reported."""

    name: str
    label: str
    version: str


@dataclass(frozen=True, slots=True)
class Missing:
    """A program that could not take part, with the reason."""

    program: str
    reason: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A work that a program could not do, with the end of its output."""

    corpus: str
    work: str
    program: str
    repetition: int
    message: str


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """The machine that was measured."""

    cores: int
    processor: str
    memory_bytes: int
    kernel: str
    system: str
    python: str
    scratch_filesystem: str
    floor_bytes: int


@dataclass(frozen=True, slots=True)
class Spread:
    """The median, the minimum and the maximum of some repetitions."""

    median: float
    least: float
    greatest: float
    count: int


@dataclass(frozen=True, slots=True)
class Run:
    """All results of one run of the benchmark."""

    started: str
    repeat: int
    quick: bool
    finished: bool
    machine: MachineFacts
    programs: tuple[ProgramFacts, ...]
    missing: tuple[Missing, ...]
    corpora: tuple[CorpusFacts, ...]
    samples: tuple[Sample, ...]
    failures: tuple[Failure, ...]
    notes: tuple[str, ...]

    def select(self, corpus: str, work: str, program: str) -> tuple[Sample, ...]:
        """Return the repetitions of one cell of the table, in their order."""
        return tuple(
            sample
            for sample in self.samples
            if (sample.corpus, sample.work, sample.program) == (corpus, work, program)
        )

    def wall(self, corpus: str, work: str, program: str) -> Spread | None:
        """Return the wall time in seconds, None if nothing was measured."""
        return spread(sample.wall_s for sample in self.select(corpus, work, program))


def spread(values: Iterable[float]) -> Spread | None:
    """Return median, minimum and maximum, None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Spread(statistics.median(ordered), ordered[0], ordered[-1], len(ordered))


def encode_run(run: Run) -> str:
    """Return the JSON text of a run, one object with a `format` number."""
    return json.dumps({"format": JSON_FORMAT, **asdict(run)}, indent=1, ensure_ascii=True) + "\n"


def decode_run(text: str) -> Run:
    """Return the run that `encode_run` wrote.

    Raises ValueError where the text is of another format.
    """
    document = json.loads(text)
    if not isinstance(document, dict) or document.get("format") != JSON_FORMAT:
        raise ValueError(f"not benchmark results of format {JSON_FORMAT}")
    try:
        return Run(
            started=document["started"],
            repeat=document["repeat"],
            quick=document["quick"],
            finished=document["finished"],
            machine=MachineFacts(**document["machine"]),
            programs=tuple(ProgramFacts(**each) for each in document["programs"]),
            missing=tuple(Missing(**each) for each in document["missing"]),
            corpora=tuple(CorpusFacts(**each) for each in document["corpora"]),
            samples=tuple(_sample(each) for each in document["samples"]),
            failures=tuple(Failure(**each) for each in document["failures"]),
            notes=tuple(document["notes"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"benchmark results are incomplete: {error}") from error


def _sample(found: dict[str, Any]) -> Sample:
    days = {name: tuple(found[name]) for name in ("day_wall_s", "day_grown_bytes")}
    return Sample(**{**found, **days})


def load_run(path: Path) -> Run:
    """Read a results file; raise OSError or ValueError."""
    return decode_run(path.read_text(encoding="ascii"))
