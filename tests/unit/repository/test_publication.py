"""The publication of a snapshot where other hosts may remove packs: draft, last look, and healing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from casfs.backup.run import BackupOptions, run_backup
from casfs.backup.stability import is_racy
from casfs.digest import SnapshotId
from casfs.errors import (
    PacksRemovedError,
    StorageDeniedError,
    StorageError,
    StorageUnavailableError,
)
from casfs.format.versions import DEFAULT_FORMAT
from casfs.maintenance.check import Checker
from casfs.maintenance.repair import SnapshotRepairer
from casfs.maintenance.rewrite import rewrite_snapshot
from casfs.monitor import RecordingMonitor
from casfs.patterns import parse_pattern
from casfs.repository.creation import create_repository
from casfs.repository.opening import (
    OpenOptions,
    open_for_maintenance,
    open_for_reading,
    open_for_writing,
)
from casfs.repository.place import LocalPlace
from casfs.repository.publication import SnapshotPublisher
from casfs.repository.remote_writers import mark_remote_writers
from casfs.repository.repository import Repository
from casfs.repository.snapshot_listing import DRAFTS, SNAPSHOTS
from casfs.storage.local import LocalStorage
from casfs.store.pending_removal import RemovalNotice, publish_notice
from tests.support.far_repository import FarRepository
from tests.support.storage_double import Call, Failure
from tests.support.stores import noise
from tests.support.waiting import wait_until

UNSYNCED = OpenOptions(sync=False)


@pytest.fixture
def far(tmp_path: Path, own_home: Path, request: pytest.FixtureRequest) -> FarRepository:
    return FarRepository(tmp_path, format_=getattr(request, "param", DEFAULT_FORMAT))


both_formats = pytest.mark.parametrize("far", [1, 2], indirect=True)
"""A writer learns of removals by a listing of the packs in format 1, by index deltas in format 2."""


def back_up(repository: Repository, source: Path) -> SnapshotId:
    options = BackupOptions((bytes(source),), host="a", patience_s=0.0)
    found = run_backup(repository, options, RecordingMonitor()).snapshot_id
    assert found is not None
    return found


def at_call(far: FarRepository, method: str, prefix: str, action: Callable[[], None]) -> None:
    """Do something just before the next call of this kind."""

    def before(call: Call) -> None:
        if call.method == method and call.name.startswith(prefix):
            far.storage.script.before = None
            action()

    far.storage.script.before = before


def mark_all(far: FarRepository) -> None:
    """Publish a notice of all packs, as a prune that knows none of the snapshots would."""
    publish_notice(far.memory, RemovalNotice.of(1, far.pack_refs()))


def steps_of(far: FarRepository) -> list[tuple[str, str]]:
    steps = [(call.method, call.name.partition("/")[0]) for call in far.storage.calls]
    return [step for step in steps if step[0] != "list entry"]


def test_a_draft_comes_before_the_last_look_and_goes_after_the_snapshot_appears(
    far: FarRepository,
) -> None:
    far.storage.calls.clear()
    far.back_up("a", a=b"a")
    steps = steps_of(far)
    draft, snapshot = steps.index(("create", DRAFTS)), steps.index(("create", SNAPSHOTS))
    looks = [n for n, step in enumerate(steps) if step == ("list", "condemned")]
    assert any(draft < look < snapshot for look in looks)
    assert any(look > snapshot for look in looks)
    assert steps.index(("delete", DRAFTS)) > max(looks)
    assert far.names(DRAFTS) == []


@pytest.mark.parametrize(("far", "removals"), [(1, "packs"), (2, "deltas")], indirect=["far"])
def test_the_notices_are_listed_before_what_says_which_packs_are_gone(
    far: FarRepository, removals: str
) -> None:
    far.storage.calls.clear()
    far.back_up("a", a=b"a")
    steps = steps_of(far)
    steps = steps[steps.index(("create", DRAFTS)) : steps.index(("create", SNAPSHOTS))]
    assert steps.index(("list", "condemned")) < steps.index(("list", removals))


def test_nothing_is_read_for_a_look_that_finds_nothing(far: FarRepository) -> None:
    far.back_up("a", a=noise("a", 100_000))
    far.storage.calls.clear()
    far.back_up("a")
    steps = steps_of(far)
    after = steps[steps.index(("create", DRAFTS)) :]
    assert [step for step in after if step[0] == "read"] == []


def test_what_was_marked_during_a_backup_is_stored_again_before_it_is_published(
    far: FarRepository,
) -> None:
    far.back_up("a", a=noise("a", 100_000))
    before = far.packs()
    at_call(far, "create", DRAFTS, lambda: mark_all(far))
    snapshot_id = far.back_up("a")
    for name in before:
        far.memory.delete(name)
    far.require_whole(snapshot_id)


def test_the_packs_that_the_backup_itself_stored_are_looked_at_too(far: FarRepository) -> None:
    at_call(far, "create", DRAFTS, lambda: mark_all(far))
    far.back_up("a", a=noise("a", 100_000))
    for pack in far.pack_refs_under_notice():
        far.memory.delete(far.name_of(pack))
    far.require_whole()


@both_formats
def test_what_was_removed_during_a_backup_is_read_from_the_source_again(
    far: FarRepository, caplog: pytest.LogCaptureFixture
) -> None:
    far.back_up("a", a=noise("a", 100_000))
    at_call(far, "create", DRAFTS, lambda: far.remove_packs())
    snapshot_id = far.back_up("a")
    assert "reading the sources again" in caplog.text
    far.require_whole(snapshot_id)


def test_a_removal_that_a_merge_hides_is_noticed_by_a_look_at_the_packs(
    far: FarRepository, caplog: pytest.LogCaptureFixture
) -> None:
    far.back_up("a", a=noise("a", 100_000))
    at_call(far, "create", DRAFTS, lambda: far.remove_packs(merges=True))
    far.storage.calls.clear()
    snapshot_id = far.back_up("a")
    assert "reading the sources again" in caplog.text
    far.require_whole(snapshot_id)


def test_a_removal_of_the_backups_own_packs_that_a_merge_hides_is_noticed(
    far: FarRepository, caplog: pytest.LogCaptureFixture
) -> None:
    far.back_up("b", b=b"b")
    stored: list[Call] = []

    def remove(call: Call) -> None:
        # The backup has stored its packs, and no delta names them yet.
        if call.method == "create" and call.name.startswith("deltas/"):
            far.storage.script.before = None
            far.remove_packs(merges=True)
            stored.append(call)

    far.storage.script.before = remove
    snapshot_id = far.back_up("a", a=noise("a", 100_000))
    assert stored and "reading the sources again" in caplog.text
    far.require_whole(snapshot_id)


def test_a_look_costs_as_many_requests_however_many_packs_there_are(far: FarRepository) -> None:
    path = far.source("a", a=b"a") / "a"
    wait_until(lambda: not is_racy(path.lstat(), time.time_ns()), "a file that a backup trusts")

    def steps_of_an_unchanged_backup() -> list[tuple[str, str]]:
        far.back_up("a")
        far.storage.calls.clear()
        far.back_up("a")
        return sorted(steps_of(far))  # some of them go side by side, in any order

    few = steps_of_an_unchanged_backup()
    for number in range(20):
        far.back_up("b", b=noise(f"{number}", 1000))
    assert len(far.packs()) >= 40
    assert steps_of_an_unchanged_backup() == few
    assert not [step for step in few if step[1] in ("packs", "meta")]


def test_new_packs_of_other_hosts_are_not_looked_at_before_the_snapshot_appears(
    far: FarRepository,
) -> None:
    far.back_up("a", a=b"a")

    def another_host() -> None:
        far.back_up("b", "second", b=noise("b", 1000))
        far.storage.calls.clear()

    at_call(far, "create", DRAFTS, another_host)
    far.back_up("a")
    steps = steps_of(far)
    assert ("read", "deltas") in steps
    assert not [step for step in steps if step[1] in ("packs", "meta")]


@both_formats
def test_a_stream_whose_data_was_removed_is_not_published(far: FarRepository) -> None:
    with far.writing() as repository:
        at_call(far, "create", DRAFTS, lambda: far.remove_packs())
        options = BackupOptions((), stdin_name=b"in", stdin_command=("echo", "x"))
        with pytest.raises(
            PacksRemovedError, match=r"nothing was published\. Run the command again"
        ):
            run_backup(repository, options, RecordingMonitor())
    assert far.names(SNAPSHOTS) == far.names(DRAFTS) == []


@both_formats
def test_packs_that_are_removed_again_and_again_end_a_backup(far: FarRepository) -> None:
    far.back_up("a", a=noise("a", 100_000))
    before = far.names(SNAPSHOTS)

    def remove(call: Call) -> None:
        if call == Call("list", "condemned"):
            far.storage.script.before = None
            far.remove_packs()
            far.storage.script.before = remove

    with far.writing() as repository:
        far.storage.script.before = remove
        with pytest.raises(PacksRemovedError):
            back_up(repository, far.folder / "sources" / "a")
        far.storage.script.before = None
    assert far.names(SNAPSHOTS) == before and far.names(DRAFTS) == []


@both_formats
def test_a_snapshot_whose_packs_vanish_while_it_appears_is_withdrawn_and_made_again(
    far: FarRepository,
) -> None:
    at_call(far, "create", SNAPSHOTS, lambda: far.remove_packs())
    snapshot_id = far.back_up("a", a=noise("a", 100_000))
    assert far.names(SNAPSHOTS) == [f"{SNAPSHOTS}/{snapshot_id.hex()}"]
    far.require_whole(snapshot_id)


def test_packs_marked_while_a_snapshot_appears_are_stored_again(far: FarRepository) -> None:
    at_call(far, "create", SNAPSHOTS, lambda: mark_all(far))
    snapshot_id = far.back_up("a", a=noise("a", 100_000))
    for pack in far.pack_refs_under_notice():
        far.memory.delete(far.name_of(pack))
    far.require_whole(snapshot_id)


def test_a_snapshot_that_may_yet_appear_keeps_its_draft(far: FarRepository) -> None:
    far.storage.script.failures.append(
        Failure(lambda call: call.method == "create" and call.name.startswith(SNAPSHOTS))
    )
    with pytest.raises(StorageUnavailableError):
        far.back_up("a", a=b"a")
    assert len(far.names(DRAFTS)) == 1


def test_a_look_that_fails_leaves_neither_draft_nor_snapshot(far: FarRepository) -> None:
    def fail() -> None:
        far.storage.script.failures.append(Failure(lambda call: call.name == "condemned"))

    at_call(far, "create", DRAFTS, fail)
    with pytest.raises(StorageUnavailableError):
        far.back_up("a", a=b"a")
    assert far.names(DRAFTS) == far.names(SNAPSHOTS) == []


def test_a_published_snapshot_counts_where_the_second_look_fails(
    far: FarRepository, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        far.storage.script.failures.append(Failure(lambda call: call.name == "condemned"))

    at_call(far, "create", SNAPSHOTS, fail)
    far.back_up("a", a=b"a")
    assert "is published; what it needs could not be looked at once more" in caplog.text


@both_formats
def test_a_pack_that_may_be_gone_and_cannot_be_looked_at_keeps_a_snapshot_from_being_published(
    far: FarRepository,
) -> None:
    far.back_up("a", a=noise("a", 100_000))
    packs = far.packs()

    def broken(call: Call) -> StorageError:
        return StorageError("read", call.name, OSError(5, "Input/output error"))

    def remove() -> None:
        is_merged = far.names("deltas") != []
        far.remove_packs(merges=is_merged)
        far.storage.script.failures.append(
            Failure(lambda call: call.method == "size" and call.name in packs, broken, times=1000)
        )

    before = far.names(SNAPSHOTS)
    at_call(far, "create", DRAFTS, remove)
    with pytest.raises(StorageError, match="Input/output error"):
        far.back_up("a")
    assert (far.names(SNAPSHOTS), far.names(DRAFTS)) == (before, [])


def test_a_credential_that_cannot_delete_is_enough_for_a_backup(
    far: FarRepository, caplog: pytest.LogCaptureFixture
) -> None:
    def denied(call: Call) -> StorageDeniedError:
        return StorageDeniedError("delete", call.name, PermissionError(13, "denied"))

    far.storage.script.failures.append(
        Failure(lambda call: call.method == "delete", denied, times=1000)
    )
    caplog.clear()
    far.back_up("a", a=b"a")
    assert caplog.records == []
    assert len(far.names(DRAFTS)) == 1


def test_a_slow_look_is_repeated(far: FarRepository) -> None:
    times = iter([0, 10**13, 10**13, 10**13])
    with far.writing() as repository:
        repository.snapshots.publisher = SnapshotPublisher(repository, True, lambda: next(times))
        far.storage.calls.clear()
        back_up(repository, far.source("a", a=b"a"))
    steps = steps_of(far)
    between = steps[steps.index(("create", DRAFTS)) : steps.index(("create", SNAPSHOTS))]
    assert between.count(("list", "condemned")) == 2


def test_a_writer_that_slept_stores_its_dropped_draft_again_and_looks_again(
    far: FarRepository,
) -> None:
    """A prune drops the draft of a writer that it takes for dead; the next one does not see the writer."""
    far.back_up("a", a=noise("a", 100_000))
    before = far.packs()

    def prunes() -> None:
        for name in far.names(DRAFTS):
            far.memory.delete(name)
        mark_all(far)

    seen: list[str] = []

    def before_call(call: Call) -> None:
        step = call.method, call.name.partition("/")[0]
        if step == ("create", DRAFTS):
            seen.append("draft")
        elif step == ("list", "deltas") and seen == ["draft"]:
            # The writer sleeps in its first look, after it has listed the notices.
            seen.append("dropped")
            prunes()
        elif step == ("create", SNAPSHOTS):
            seen.append(f"snapshot beside {len(far.names(DRAFTS))} draft")

    times = iter([0, 10**15, 10**15, 10**15])
    with far.writing() as repository:
        repository.snapshots.publisher = SnapshotPublisher(repository, True, lambda: next(times))
        far.storage.script.before = before_call
        snapshot_id = back_up(repository, far.source("a"))
        far.storage.script.before = None
    assert seen == ["draft", "dropped", "draft", "snapshot beside 1 draft"]
    for name in before:
        far.memory.delete(name)
    far.require_whole(snapshot_id)


class TestTag:
    def test_a_tag_needs_no_look_while_the_old_snapshot_is_there(self, far: FarRepository) -> None:
        snapshot_id = far.back_up("a", a=b"a")
        with far.writing(command="tag") as repository:
            snapshot = repository.snapshots.load(snapshot_id)
            far.storage.calls.clear()
            repository.snapshots.retag(snapshot_id, snapshot, ("kept",))
        assert ("list", "condemned") not in steps_of(far)
        far.require_whole()

    def test_a_tag_of_a_snapshot_that_was_forgotten_meanwhile_looks_and_heals(
        self, far: FarRepository
    ) -> None:
        snapshot_id = far.back_up("a", a=noise("a", 100_000))

        def forget() -> None:
            far.memory.delete(f"{SNAPSHOTS}/{snapshot_id.hex()}")
            mark_all(far)

        with far.writing(command="tag") as repository:
            snapshot = repository.snapshots.load(snapshot_id)
            at_call(far, "create", SNAPSHOTS, forget)
            new_id, _ = repository.snapshots.retag(snapshot_id, snapshot, ("kept",))
        for pack in far.pack_refs_under_notice():
            far.memory.delete(far.name_of(pack))
        far.require_whole(new_id)

    def test_a_tag_of_a_snapshot_whose_data_is_gone_publishes_nothing(
        self, far: FarRepository
    ) -> None:
        snapshot_id = far.back_up("a", a=noise("a", 100_000))

        def forget() -> None:
            far.memory.delete(f"{SNAPSHOTS}/{snapshot_id.hex()}")
            far.remove_packs()

        with far.writing(command="tag") as repository:
            snapshot = repository.snapshots.load(snapshot_id)
            at_call(far, "create", SNAPSHOTS, forget)
            with pytest.raises(PacksRemovedError):
                repository.snapshots.retag(snapshot_id, snapshot, ("kept",))
        assert far.names(SNAPSHOTS) == far.names(DRAFTS) == []


class TestRepetition:
    """Commands that store what a snapshot needs, and store it again where a prune removed it meanwhile."""

    @both_formats
    def test_a_rewrite_whose_new_directories_are_removed_stores_them_again(
        self, far: FarRepository, caplog: pytest.LogCaptureFixture
    ) -> None:
        old = far.back_up("a", a=noise("a", 50_000), b=noise("b", 50_000))
        kept = far.packs()
        with open_for_maintenance(far.host("first"), "rewrite", UNSYNCED) as repository:
            at_call(far, "create", DRAFTS, lambda: far.remove_packs(keeps=kept))
            snapshot = repository.snapshots.load(old)
            exclude = [parse_pattern(b"b")]
            found = rewrite_snapshot(repository, old, snapshot, exclude, RecordingMonitor())
        assert found.new_id is not None
        assert far.names(SNAPSHOTS) == [f"{SNAPSHOTS}/{found.new_id.hex()}"]
        assert far.names(DRAFTS) == [] and len(found.removed) == 1
        assert caplog.text.count("rewriting the snapshot again") == 1
        far.require_whole(found.new_id)

    @both_formats
    def test_a_rewrite_whose_new_directories_are_removed_again_and_again_changes_nothing(
        self, far: FarRepository
    ) -> None:
        old = far.back_up("a", a=noise("a", 50_000), b=noise("b", 50_000))
        kept = far.packs()

        def remove(call: Call) -> None:
            if call == Call("list", "condemned"):
                far.storage.script.before = None
                far.remove_packs(keeps=kept)
                far.storage.script.before = remove

        with open_for_maintenance(far.host("first"), "rewrite", UNSYNCED) as repository:
            snapshot = repository.snapshots.load(old)
            far.storage.script.before = remove
            with pytest.raises(PacksRemovedError):
                rewrite_snapshot(
                    repository, old, snapshot, [parse_pattern(b"b")], RecordingMonitor()
                )
            far.storage.script.before = None
        assert far.names(SNAPSHOTS) == [f"{SNAPSHOTS}/{old.hex()}"] and far.names(DRAFTS) == []
        far.require_whole(old)

    @both_formats
    def test_a_repair_whose_new_directories_are_removed_stores_them_again_and_reports_once(
        self, far: FarRepository, caplog: pytest.LogCaptureFixture
    ) -> None:
        lost = far.back_up("a", a=noise("a", 50_000))
        before = far.packs()
        far.back_up("a", b=noise("b", 50_000))
        far.forget(lost)
        for pack in before:
            if pack.startswith("packs/"):
                far.memory.delete(pack)
        kept = far.packs()
        monitor = RecordingMonitor()
        with open_for_maintenance(far.host("repairer"), "repair", UNSYNCED) as repository:
            at_call(far, "create", DRAFTS, lambda: far.remove_packs(keeps=kept))
            (found,) = SnapshotRepairer(repository, monitor).repair().repaired
        assert found.new_id is not None and found.dropped == 1
        assert far.names(SNAPSHOTS) == [f"{SNAPSHOTS}/{found.new_id.hex()}"]
        assert caplog.text.count("repairing the snapshot again") == 1
        assert len([one for one in monitor.problems if "is dropped" in one.message]) == 1
        far.require_whole(found.new_id)


class TestFolder:
    def test_a_folder_that_only_its_own_machine_uses_has_no_drafts(
        self, tmp_path: Path, own_home: Path
    ) -> None:
        steps: list[str] = []
        place = LocalPlace(tmp_path / "r")
        create_repository(place)
        (tmp_path / "source").mkdir()
        options = OpenOptions(sync=False, on_step=steps.append)
        with open_for_writing(place, "backup", options) as repository:
            back_up(repository, tmp_path / "source")
        assert not (place.root / DRAFTS).exists()

    def test_a_folder_that_a_host_begins_to_use_during_a_backup_is_looked_at(
        self, tmp_path: Path, own_home: Path
    ) -> None:
        place = LocalPlace(tmp_path / "r")
        create_repository(place)
        (tmp_path / "source").mkdir()
        storage = LocalStorage(place.root, sync=False)
        with open_for_writing(place, "backup", OpenOptions(sync=False)) as repository:
            mark_remote_writers(storage)
            snapshot_id = back_up(repository, tmp_path / "source")
        assert (place.root / DRAFTS).is_dir() and list((place.root / DRAFTS).iterdir()) == []
        assert (place.root / SNAPSHOTS / snapshot_id.hex()).exists()
        storage.close()


def test_a_mark_that_another_process_removes_from_the_index_stays_a_mark_for_the_writer(
    far: FarRepository,
) -> None:
    far.forget(far.back_up("a", a=noise("a", 100_000)))
    far.prune("other")
    under_notice = far.pack_refs_under_notice()
    with far.writing() as repository:
        # A prune of this machine that listed the notices earlier shares the index.
        repository.store.index.mark_for_removal(())
        snapshot_id = back_up(repository, far.source("a"))
    for pack in under_notice:
        far.memory.delete(far.name_of(pack))
    far.require_whole(snapshot_id)


def test_a_mark_that_vanishes_from_the_index_during_the_look_stays_a_mark(
    far: FarRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    far.back_up("a", a=noise("a", 100_000))
    at_call(far, "create", DRAFTS, lambda: mark_all(far))
    before = far.packs()
    restore = SnapshotPublisher._restore

    def unmark_first(self: SnapshotPublisher, *arguments: object) -> None:
        self._repository.store.index.mark_for_removal(())
        restore(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(SnapshotPublisher, "_restore", unmark_first)
    snapshot_id = far.back_up("a")
    for name in before:
        far.memory.delete(name)
    far.require_whole(snapshot_id)


def test_a_pack_that_another_host_found_lost_is_stored_again_by_the_next_backup(
    far: FarRepository,
) -> None:
    far.back_up("b", host="second", b=noise("b", 100_000))
    lost = {name for name in far.packs() if name.startswith("packs/")}
    far.back_up("a", a=noise("a", 100_000))
    for name in lost:
        far.memory.delete(name)
    with open_for_reading(far.host("first"), may_write_index=True) as repository:
        assert Checker(repository, RecordingMonitor()).check(None).damage
    # The check found that the pack is gone, and the next delta of its host says so.
    far.back_up("a", more=b"more")
    far.require_whole(far.back_up("b", host="second"))


def test_a_snapshot_whose_delta_is_missing_is_found_whole_by_another_host(
    far: FarRepository,
) -> None:
    far.back_up("a", a=noise("a", 100_000))
    before = set(far.names("deltas"))
    snapshot_id = far.back_up("b", b=noise("b", 100_000))
    # As a writer leaves it that opened the repository before its upgrade to format 2.
    for name in set(far.names("deltas")) - before:
        far.memory.delete(name)
    far.require_whole(snapshot_id)
