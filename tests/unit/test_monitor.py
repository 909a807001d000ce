"""What the library counts while it works: bytes as they are read, and totals that are reached."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from casfs.backup.run import BackupOptions, run_backup
from casfs.maintenance.check import Checker
from casfs.maintenance.prune import Pruner
from casfs.maintenance.prune_plan import PruneOptions
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import Progress, RecordingMonitor, Unit
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_maintenance, open_for_writing
from casfs.restore.restorer import RestoreOptions, Restorer

MIB = 1 << 20
LARGE_BYTES = 12 * MIB


@dataclass(slots=True)
class RecordedProgress(Progress):
    """Progress that keeps the sums of bytes after each step, by stage, and what each stage expected."""

    steps: dict[str, list[int]] = field(default_factory=dict)
    expected: dict[str, tuple[Unit, int | None, int | None, bool]] = field(default_factory=dict)

    def begin(
        self,
        stage: str,
        unit: Unit,
        *,
        total_items: int | None = None,
        total_bytes: int | None = None,
        is_estimate: bool = False,
    ) -> None:
        Progress.begin(
            self,
            stage,
            unit,
            total_items=total_items,
            total_bytes=total_bytes,
            is_estimate=is_estimate,
        )
        self.expected[stage] = (unit, total_items, total_bytes, is_estimate)
        self.steps[stage] = []

    def read_bytes(self, count: int) -> None:
        Progress.read_bytes(self, count)
        self.note()

    def finish_file(self, size: int) -> None:
        Progress.finish_file(self, size)
        self.note()

    def add_bytes(self, count: int) -> None:
        Progress.add_bytes(self, count)
        self.note()

    def note(self) -> None:
        self.steps.setdefault(self.stage, []).append(self.done_bytes + self.file_bytes)


@pytest.fixture
def monitor() -> RecordingMonitor:
    recording = RecordingMonitor()
    recording.progress = RecordedProgress()
    return recording


def recorded(monitor: RecordingMonitor) -> RecordedProgress:
    assert isinstance(monitor.progress, RecordedProgress)
    return monitor.progress


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    source = tmp_path / "source"
    source.mkdir()
    (source / "large").write_bytes(os.urandom(LARGE_BYTES))
    (source / "small").write_bytes(b"small")
    create_repository(tmp_path / "repository")
    yield tmp_path / "repository"


def back_up(root: Path, monitor: RecordingMonitor) -> None:
    options = BackupOptions(paths=(os.fsencode(root.parent / "source"),), patience_s=0)
    with open_for_writing(root, "backup", OpenOptions(sync=False)) as repository:
        run_backup(repository, options, monitor)


def assert_moves_inside_a_large_object(steps: list[int], total: int, at_least: int = 3) -> None:
    assert steps[-1] == total
    assert steps == sorted(steps)
    assert len({step for step in steps if 0 < step < LARGE_BYTES}) >= at_least


def test_a_backup_counts_bytes_inside_a_large_file(root: Path, monitor: RecordingMonitor) -> None:
    back_up(root, monitor)
    progress = recorded(monitor)
    assert progress.expected[""] == (Unit.FILES, None, None, False)
    assert_moves_inside_a_large_object(progress.steps[""], LARGE_BYTES + 5)


def test_a_backup_expects_what_the_parent_snapshot_holds(
    root: Path, monitor: RecordingMonitor
) -> None:
    back_up(root, RecordingMonitor())
    back_up(root, monitor)
    progress = recorded(monitor)
    assert progress.expected[""] == (Unit.FILES, 2, LARGE_BYTES + 5, True)
    assert progress.steps[""][-1] == LARGE_BYTES + 5


def test_a_restore_counts_bytes_inside_a_large_file(root: Path, monitor: RecordingMonitor) -> None:
    back_up(root, RecordingMonitor())
    with open_for_writing(root, "restore", OpenOptions(sync=False)) as repository:
        _, _, path, node = repository.snapshots.resolve_path("latest")
        restorer = Restorer(repository, RestoreOptions(), monitor)
        restorer.restore(path, node, os.fsencode(root.parent / "target"), False)
    assert_moves_inside_a_large_object(recorded(monitor).steps[""], LARGE_BYTES + 5)


def test_a_check_that_reads_data_counts_bytes_inside_a_pack_and_reaches_its_total(
    root: Path, monitor: RecordingMonitor
) -> None:
    back_up(root, RecordingMonitor())
    with open_for_writing(root, "check", OpenOptions(sync=False)) as repository:
        Checker(repository, monitor).check(PackSelection())
    progress = recorded(monitor)
    unit, packs, total_bytes, is_estimate = progress.expected["reading packs"]
    assert (unit, packs, is_estimate) == (Unit.PACKS, 2, False)
    assert total_bytes is not None and total_bytes > LARGE_BYTES
    # A check reads windows of 8 MiB.
    assert_moves_inside_a_large_object(progress.steps["reading packs"], total_bytes, at_least=1)
    assert progress.expected["checking files"][0] == Unit.FILES
    assert progress.items == 2


def test_a_prune_counts_bytes_inside_a_pack_that_it_repacks(
    root: Path, monitor: RecordingMonitor
) -> None:
    (root.parent / "source" / "goes").write_bytes(os.urandom(LARGE_BYTES))
    back_up(root, RecordingMonitor())
    (root.parent / "source" / "goes").unlink()
    back_up(root, RecordingMonitor())
    with open_for_maintenance(root, "prune", OpenOptions(sync=False)) as repository:
        first = min(repository.snapshots.iterate(), key=lambda found: found[1].time_ns)[0]
        repository.snapshots.delete(first)
        result = Pruner(repository, PruneOptions(margin_s=0), monitor).prune()
    progress = recorded(monitor)
    assert result.repacked_packs >= 1
    unit, packs, total_bytes, _ = progress.expected["repacking"]
    assert (unit, packs) == (Unit.PACKS, result.repacked_packs)
    assert total_bytes is not None
    assert_moves_inside_a_large_object(progress.steps["repacking"], total_bytes)
    assert progress.expected["removing packs"][0] == Unit.PACKS
