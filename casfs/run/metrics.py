"""Metrics of a profile in Prometheus's text format, for the textfile collector of node_exporter.

The file is replaced as a whole. All values come from the record of the profile, so after a run that fails the
numbers are those of the last good backup and check. Times are Unix times, because an age in a file would not
grow while nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from casfs.atomic_file import replace_file
from casfs.errors import StorageError
from casfs.run.state import ProfileState

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """A gauge: `samples` are labels beside those of the profile, and a value (None: not known yet)."""

    name: str
    help: str
    samples: tuple[tuple[Labels, float | None], ...]


def profile_metrics(state: ProfileState) -> Iterator[Metric]:
    """Yield every metric of a profile, in the order of the file."""
    yield _one("run_last_start_timestamp_seconds", "When the last run began.", state.last_start_s)
    yield _one("run_last_end_timestamp_seconds", "When the last run ended.", state.last_end_s)
    yield _one(
        "run_last_success_timestamp_seconds",
        "When the last run ended that did not fail (exit 0 or 4).",
        state.last_success_s,
    )
    yield _one("run_exit_code", "Exit code of the last run.", state.last_exit)
    yield _one("run_duration_seconds", "How long the last run took.", state.last_seconds)
    yield _one(
        "run_consecutive_failures",
        "Runs that failed since the last one that did not.",
        state.failures_in_a_row,
    )
    steps = sorted(state.steps.items())
    for name, help_text, values in (
        ("last_run_timestamp_seconds", "When a step last began.", [s.last_run_s for _, s in steps]),
        (
            "last_success_timestamp_seconds",
            "When a step last began that succeeded.",
            [s.last_success_s for _, s in steps],
        ),
        ("exit_code", "Exit code of a step when it last ran.", [s.exit for _, s in steps]),
        (
            "duration_seconds",
            "How long a step took when it last ran.",
            [s.seconds for _, s in steps],
        ),
    ):
        labels = [_step_labels(key) for key, _ in steps]
        yield Metric(f"casfs_step_{name}", help_text, tuple(zip(labels, values, strict=True)))
    backup = state.backup
    for field, name, help_text in (
        ("time_s", "timestamp_seconds", "When the last published snapshot was taken."),
        ("files", "files", "Files in the last published snapshot."),
        ("bytes", "bytes", "Size of the files in the last published snapshot."),
        ("added_bytes", "added_bytes", "What the last published snapshot added to the repository."),
        ("flagged", "flagged_files", "Files that changed while the last snapshot was taken."),
        ("unreadable", "unreadable_files", "Sources that the last backup could not read."),
        ("vanished", "vanished_files", "Files that vanished while the last snapshot was taken."),
    ):
        value = getattr(backup, field) if backup is not None else None
        yield _one(f"backup_{name}", help_text, value)
    yield _one("check_damage", "Problems that the last check found.", state.damage)
    repository = state.repository
    for field, name, help_text in (
        ("bytes", "bytes", "Size of all packs in the repository."),
        ("packs", "packs", "Packs in the repository."),
        ("unverified_packs", "unverified_packs", "Packs whose data no check has ever read."),
        (
            "oldest_verification_s",
            "oldest_verification_timestamp_seconds",
            "When the pack that was verified longest ago was verified, or written if it never was.",
        ),
    ):
        value = getattr(repository, field) if repository is not None else None
        yield _one(f"repository_{name}", help_text, value)


def metrics_text(state: ProfileState, repository: str) -> str:
    """Return the content of the file, without metrics that have no known value."""
    common: Labels = (("profile", state.profile), ("repository", repository))
    lines = []
    for metric in profile_metrics(state):
        samples = [(labels, value) for labels, value in metric.samples if value is not None]
        if samples:
            lines.append(f"# HELP {metric.name} {metric.help}")
            lines.append(f"# TYPE {metric.name} gauge")
            lines += [f"{metric.name}{_labels(common + own)} {value}" for own, value in samples]
    return "\n".join(lines) + "\n"


def write_metrics(path: Path, text: str) -> None:
    """Replace the file atomically, readable by every user; raises StorageError.

    The name of the unfinished file does not end in `.prom`, so no collector reads it.
    """
    try:
        replace_file(path, text.encode(), mode=0o644)
    except OSError as error:
        raise StorageError("write the metrics file", str(path), error) from error


def _one(name: str, help_text: str, value: float | None) -> Metric:
    return Metric(f"casfs_{name}", help_text, (((), value),))


def _step_labels(key: str) -> Labels:
    step, _, target = key.partition(" ")
    return (("step", step), ("target", target)) if target else (("step", step),)


def _labels(labels: Labels) -> str:
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in labels) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
