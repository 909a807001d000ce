"""A mirror to a place that another machine has pruned: what is missing there is copied again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from casfs.digest import SnapshotId
from casfs.maintenance.check import Checker
from casfs.maintenance.mirror import MISSING_NAME, Mirror, MirrorResult
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.deltas import REPLACED_MARGIN_MS
from casfs.repository.opening import open_for_reading
from tests.support.far_repository import HOUR_NS, FarRepository
from tests.support.stores import noise

DAY_S = 86_400


@pytest.fixture
def source(tmp_path: Path, own_home: Path) -> FarRepository:
    """A repository with two snapshots that share half of a pack, and a third one apart."""
    (tmp_path / "source").mkdir()
    made = FarRepository(tmp_path / "source")
    made.back_up("home", old=noise("old", 100_000), kept=noise("kept", 100_000))
    (made.source("home") / "old").unlink()
    made.back_up("home", new=noise("new", 100_000))
    made.back_up("other", other=noise("other", 50_000))
    return made


@pytest.fixture
def copy(tmp_path: Path) -> FarRepository:
    (tmp_path / "copy").mkdir()
    return FarRepository(tmp_path / "copy", is_made=False)


def mirror(
    source: FarRepository, copy: FarRepository, delete: bool = False, now_s: float = 1e9
) -> MirrorResult:
    result = Mirror(source.memory, copy.memory, RecordingMonitor(), now_s=lambda: now_s).run(
        delete, 7 * DAY_S
    )
    assert result.damage == []
    return result


def snapshots(far: FarRepository, host: str) -> list[SnapshotId]:
    with open_for_reading(far.host(host)) as repository:
        return [snapshot_id for snapshot_id, _ in repository.snapshots.iterate()]


def forget_first(copy: FarRepository) -> None:
    with copy.writing("pruner", "forget") as repository:
        first, _ = next(iter(repository.snapshots.iterate()))
        repository.snapshots.delete(first)


def prune(copy: FarRepository) -> None:
    """Mark, wait for the margin, and remove, on a machine that knows nothing of the source."""
    copy.prune("pruner", unused_share=0.0)
    copy.now_ns += HOUR_NS
    assert copy.prune("pruner", unused_share=0.0).removed_packs > 0


def merge(copy: FarRepository) -> None:
    """Prune and replace the deltas by one, and delete the replaced ones."""
    prune(copy)
    copy.now_ns += REPLACED_MARGIN_MS * 1_000_000
    copy.prune("pruner")


def must_be_whole(copy: FarRepository, count: int) -> None:
    """Require that every host reads every snapshot: one that never was there, and the one that pruned."""
    for host in ("never there", "pruner"):
        ids = snapshots(copy, host)
        assert len(ids) == count
        with open_for_reading(copy.host(host), may_write_index=True) as repository:
            checked = Checker(repository, RecordingMonitor()).check(PackSelection())
            assert checked.damage == []
    copy.require_whole()


@pytest.mark.parametrize("pruning", [prune, merge])
def test_what_another_machine_pruned_from_the_destination_is_copied_again(
    source: FarRepository, copy: FarRepository, pruning: Callable[[FarRepository], None]
) -> None:
    mirror(source, copy)
    before = copy.packs()
    forget_first(copy)
    pruning(copy)
    missing = before - copy.packs()
    assert missing
    result = mirror(source, copy)
    assert before <= copy.packs()
    assert result.copied >= len(missing) + 1
    must_be_whole(copy, 3)
    assert mirror(source, copy).copied == 0


@pytest.mark.parametrize("pruning", [prune, merge])
def test_backups_and_prunes_of_the_destination_go_on_after_it_was_mirrored_again(
    source: FarRepository, copy: FarRepository, pruning: Callable[[FarRepository], None]
) -> None:
    mirror(source, copy)
    forget_first(copy)
    pruning(copy)
    mirror(source, copy)
    copy.back_up("home", host="pruner", old=noise("old", 100_000))
    copy.back_up("home", host="newcomer", old=noise("old", 100_000), more=noise("more", 1000))
    copy.prune("pruner", unused_share=0.0)
    copy.now_ns += HOUR_NS
    copy.prune("newcomer", unused_share=0.0)
    must_be_whole(copy, 5)


def test_a_snapshot_comes_back_whole_while_a_removal_notice_names_its_packs(
    source: FarRepository, copy: FarRepository
) -> None:
    mirror(source, copy)
    forget_first(copy)
    assert copy.prune("pruner", unused_share=0.0).marked_packs > 0
    mirror(source, copy)
    must_be_whole(copy, 3)
    copy.now_ns += HOUR_NS
    copy.prune("pruner", unused_share=0.0)
    must_be_whole(copy, 3)
    mirror(source, copy)
    must_be_whole(copy, 3)


def test_a_prune_that_is_at_work_at_the_destination_is_reported(
    source: FarRepository, copy: FarRepository, caplog: pytest.LogCaptureFixture
) -> None:
    mirror(source, copy)
    forget_first(copy)
    with copy.pruning("pruner"):
        mirror(source, copy, now_s=copy.now_ns / 1e9)
    assert "a prune is at work in s3://bucket/r; mirror again" in caplog.text
    caplog.clear()
    forget_first(copy)
    mirror(source, copy, now_s=copy.now_ns / 1e9)
    assert "mirror again" not in caplog.text


def test_the_record_of_missing_objects_follows_what_another_machine_pruned(
    source: FarRepository, copy: FarRepository
) -> None:
    mirror(source, copy)
    source.forget(snapshots(source, "first")[0])
    source.prune(unused_share=0.0)
    source.now_ns += HOUR_NS
    source.prune(unused_share=0.0)
    first = mirror(source, copy, delete=True)
    assert first.pending > 0
    forget_first(copy)
    prune(copy)
    later = mirror(source, copy, delete=True, now_s=1e9 + DAY_S)
    recorded = copy.memory.read(MISSING_NAME)
    for name in ("snapshots/", "packs/"):
        for found in copy.names(name.rstrip("/")):
            assert (found.encode() in recorded) == (found not in source.names(name.rstrip("/")))
    assert later.deleted == 0
    must_be_whole(copy, 2)
    assert mirror(source, copy, delete=True, now_s=1e9 + 30 * DAY_S).deleted > 0
    must_be_whole(copy, 2)
    source_names = {name for name in source.memory._objects if name.startswith(("packs/", "meta/"))}
    assert copy.packs() == source_names
