"""The results of the remote benchmark: one record for each work, saved at once, and the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path


class RemoteWork(StrEnum):
    """The works, in their order."""

    FIRST = "first backup"
    UNCHANGED = "unchanged backup"
    RESTORE = "restore of everything"
    RESTORE_ONE = "restore of one file"
    MOUNT = "mount until usable"
    FIND = "find"
    COPY = "cp -a of 1,000 small files out of a mount"
    PRUNE = "prune of half"


@dataclass(frozen=True, slots=True)
class RemoteSample:
    """The cost of one work over one line; `failure` is why it has none.

    Bytes and requests are those of the line. `peak_bytes` is the peak memory of the largest process.
    """

    round_trip_ms: int
    megabits_per_s: int
    program: str
    work: str
    wall_s: float = 0.0
    requests: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    peak_bytes: int = 0
    failure: str = ""


@dataclass(frozen=True, slots=True)
class RemoteRun:
    """What was measured, and where."""

    started: str
    machine: str
    server: str
    programs: dict[str, str]
    source_bytes: int
    samples: tuple[RemoteSample, ...] = ()


def save_run(run: RemoteRun, path: Path) -> None:
    """Write the results as JSON, replacing those of before."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(asdict(run), indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def load_run(path: Path) -> RemoteRun:
    """Read results that `save_run` wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    samples = tuple(RemoteSample(**one) for one in found.pop("samples"))
    return RemoteRun(**found, samples=samples)


def render_run(run: RemoteRun) -> str:
    """Return the report in Markdown: a table for each line, and what failed."""
    programs = ", ".join(version for version in run.programs.values())
    lines = [
        f"{run.source_bytes / 1e6:.0f} MB in 1,008 files, 1,000 of them small. {programs}; {run.server}. "
        f"{run.machine}, {run.started}.",
        "",
    ]
    for round_trip_ms, megabits in sorted(
        {(s.round_trip_ms, s.megabits_per_s) for s in run.samples}
    ):
        here = [
            s
            for s in run.samples
            if (s.round_trip_ms, s.megabits_per_s) == (round_trip_ms, megabits)
        ]
        lines += [f"### {round_trip_ms} ms, {megabits} Mbit/s", ""]
        lines += _table(here, list(run.programs), megabits)
        lines.append("")
    failures = [s for s in run.samples if s.failure]
    if failures:
        lines += ["### What failed", ""]
        lines += [
            f"- {s.program}, {s.work}, {s.round_trip_ms} ms, {s.megabits_per_s} Mbit/s: {s.failure}"
            for s in failures
        ]
        lines.append("")
    return "\n".join(lines)


def _table(samples: Sequence[RemoteSample], programs: Sequence[str], megabits: int) -> list[str]:
    heads = [
        f"{program}: {what}"
        for program in programs
        for what in ("time", "requests", "sent", "received", "memory")
    ]
    lines = [
        "| work | " + " | ".join(heads) + " | time of the line |",
        "|---" * (len(heads) + 2) + "|",
    ]
    for work in RemoteWork:
        cells: list[str] = []
        for program in programs:
            found = [s for s in samples if (s.program, s.work) == (program, work.value)]
            cells += _cells(found[0]) if found and not found[0].failure else ["–"] * 5
        first = [s for s in samples if s.work == work.value and s.program == programs[0]]
        cells.append(
            f"{_line_s(first[0], megabits):.1f} s" if first and not first[0].failure else "–"
        )
        lines.append(f"| {work.value} | " + " | ".join(cells) + " |")
    return lines


def _cells(sample: RemoteSample) -> list[str]:
    return [
        f"{sample.wall_s:.2f} s",
        str(sample.requests),
        f"{sample.sent_bytes / 1e6:.1f} MB",
        f"{sample.received_bytes / 1e6:.1f} MB",
        f"{sample.peak_bytes / 1e6:.0f} MB",
    ]


def _line_s(sample: RemoteSample, megabits: int) -> float:
    """Return the time that the line needs for the bytes of the first program."""
    return max(sample.sent_bytes, sample.received_bytes) * 8 / (megabits * 1e6)
