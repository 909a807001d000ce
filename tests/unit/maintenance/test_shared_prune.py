"""Prune where hosts write over a network: what one run marks and a later one removes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from casfs.backup.run import BackupOptions, run_backup
from casfs.digest import PackId
from casfs.errors import (
    NotFoundError,
    RefusedError,
    StorageDeniedError,
    StorageUnavailableError,
)
from casfs.format.pack import PackRef
from casfs.maintenance.drafts import DraftUnreadableError, drop_draft
from casfs.maintenance.prune_result import PruneResult
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import open_for_reading
from casfs.repository.presence import Presence
from casfs.repository.snapshot_listing import DRAFTS, SNAPSHOTS
from casfs.storage.base import ListedObject
from casfs.storage.clock import StorageClock
from casfs.storage.locks import LockMode, LockRecord
from casfs.storage.memory import MemoryStorage
from casfs.store.pending_removal import (
    MAX_NOTICE_BYTES,
    MAX_NOTICE_PACKS,
    MAX_NOTICES,
    DamagedNoticeError,
    RemovalNotice,
    TooManyNoticesError,
    encode_notice,
    list_notices,
    notices_of,
    packs_pending_removal,
    publish_notice,
)
from tests.support.far_repository import HOUR_NS, FarRepository
from tests.support.storage_double import Call, Failure
from tests.support.stores import noise


@pytest.fixture
def far(tmp_path: Path, own_home: Path) -> FarRepository:
    return FarRepository(tmp_path)


@pytest.fixture
def unneeded(far: FarRepository) -> set[str]:
    """The packs of a forgotten snapshot, beside those of a kept one."""
    far.back_up("kept", kept=noise("kept", 100_000))
    before = far.packs()
    gone = far.back_up("gone", gone=noise("gone", 100_000))
    far.forget(gone)
    return far.packs() - before


def test_a_prune_marks_what_no_snapshot_needs_and_removes_nothing(
    far: FarRepository, unneeded: set[str]
) -> None:
    before = far.packs()
    result = far.prune()
    assert far.packs() == before
    assert (result.marked_packs, result.removed_packs) == (len(unneeded), 0)
    assert result.waiting_packs == len(unneeded)
    assert 0 < result.removable_ns - far.now_ns <= HOUR_NS
    assert len(packs_pending_removal(far.memory)) == len(unneeded)


def test_a_prune_before_the_margin_has_passed_removes_nothing(
    far: FarRepository, unneeded: set[str]
) -> None:
    far.prune()
    far.now_ns += HOUR_NS - 1_000_000_000
    result = far.prune()
    assert (result.marked_packs, result.removed_packs) == (0, 0)
    assert result.waiting_packs == len(unneeded)


def test_the_first_prune_of_any_host_after_the_margin_removes_it(
    far: FarRepository, unneeded: set[str]
) -> None:
    far.prune()
    far.now_ns += HOUR_NS
    before = far.packs()
    result = far.prune("other")
    assert before - far.packs() == unneeded
    assert result.removed_packs == len(unneeded)
    assert (result.waiting_packs, result.removable_ns) == (0, 0)
    assert far.names("condemned") == []
    far.require_whole()


def test_a_dry_run_changes_nothing_and_predicts_the_rest(
    far: FarRepository, unneeded: set[str]
) -> None:
    def estimate() -> PruneResult:
        before = {name: far.memory.read(name) for name in far.memory._objects}
        with far.pruning(dry_run=True) as pruner:
            result = pruner.estimate(pruner.plan())
        after = {name: far.memory.read(name) for name in far.memory._objects}
        assert {n: d for n, d in after.items() if not n.startswith("presence/")} == before
        return result

    marked = estimate()
    assert (marked.marked_packs, marked.removed_packs) == (len(unneeded), 0)
    assert marked.removable_ns > far.now_ns
    far.prune()
    far.now_ns += HOUR_NS
    assert estimate().removed_packs == len(unneeded)


def test_data_that_is_needed_again_is_copied_out_of_a_pack_before_its_removal(
    far: FarRepository, unneeded: set[str]
) -> None:
    far.prune()
    # A snapshot that an attacker, or a writer that does not look, publishes behind the notice.
    with far.writing(command="tag") as repository:
        repository.snapshots.publisher = None
        options = BackupOptions((bytes(far.folder / "sources" / "gone"),), patience_s=0.0)
        repository.store.index.mark_for_removal(())
        run_backup(repository, options, RecordingMonitor())
    far.now_ns += HOUR_NS
    result = far.prune()
    assert unneeded.isdisjoint(far.packs())
    assert result.removed_packs == len(unneeded) and result.new_bytes >= 100_000
    far.require_whole()


def test_a_forged_notice_of_needed_packs_costs_work_and_no_data(far: FarRepository) -> None:
    """A credential that can create objects is enough to publish a notice of everything."""
    first = far.back_up("a", a=noise("a", 100_000))
    publish_notice(far.memory, RemovalNotice.of(1, far.pack_refs()))
    second = far.back_up("b", host="other", b=noise("b", 100_000))
    far.now_ns += HOUR_NS
    far.prune()
    far.require_whole(first, second)
    assert far.names("condemned") == []


def test_repacking_stores_the_copies_before_the_old_pack_is_marked(far: FarRepository) -> None:
    first = far.back_up("a", large=noise("large", 200_000), small=noise("small", 20_000))
    (far.folder / "sources" / "a" / "large").unlink()
    far.back_up("a")
    far.forget(first)
    before = far.packs()
    far.storage.calls.clear()
    result = far.prune(unused_share=0.1)
    assert result.repacked_packs >= 1 and before < far.packs()
    steps = [(call.method, call.name.partition("/")[0]) for call in far.storage.calls]
    copies = [n for n, (_, folder) in enumerate(steps[:-1]) if folder in ("packs", "meta")]
    last_copy = max(n for n in copies if steps[n][0] in ("create", "commit"))
    assert last_copy < steps.index(("create", "condemned"))
    far.now_ns += HOUR_NS
    assert far.prune(unused_share=0.1).removed_packs == result.marked_packs
    far.require_whole()


def test_a_pack_under_notice_is_never_taken_out_of_the_notice(
    far: FarRepository, unneeded: set[str]
) -> None:
    far.prune()
    notices = far.names("condemned")
    far.back_up("gone again", gone=noise("gone", 100_000))
    far.prune()
    assert set(notices) <= set(far.names("condemned"))


def test_a_prune_keeps_the_marks_of_notices_that_were_published_after_its_list(
    far: FarRepository, unneeded: set[str]
) -> None:
    far.prune()
    far.now_ns += HOUR_NS
    with far.pruning() as pruner:
        plan = pruner.plan()
        kept = [pack for pack in far.pack_refs() if far.name_of(pack) not in unneeded]
        publish_notice(far.memory, RemovalNotice.of(1, kept))
        pruner.execute(plan)
        marked = pruner._index.marked_for_removal()
        assert {one.pack for one in pruner._index.packs() if one.ordinal in marked} == set(kept)


@pytest.mark.parametrize("prefix", ["condemned", DRAFTS, SNAPSHOTS, "packs", "meta"])
def test_an_error_of_any_listing_ends_a_prune_before_it_removes(
    far: FarRepository, unneeded: set[str], prefix: str
) -> None:
    far.prune()
    far.now_ns += HOUR_NS
    before = far.packs()

    def fail(call: Call) -> bool:
        return call.method.startswith("list") and call.name == prefix

    with far.pruning() as pruner:
        far.storage.script.failures.append(Failure(fail, times=1000))
        with pytest.raises(StorageUnavailableError):
            pruner.prune()
        far.storage.script.failures.clear()
    assert far.packs() == before


def test_a_damaged_notice_ends_a_prune_with_its_name(
    far: FarRepository, unneeded: set[str]
) -> None:
    far.prune()
    (name,) = far.names("condemned")
    far.memory.write(name, b"{")
    far.now_ns += HOUR_NS
    before = far.packs()
    with pytest.raises(DamagedNoticeError, match=name):
        far.prune()
    assert far.packs() == before


class TestDrafts:
    def test_what_a_draft_needs_is_kept(self, far: FarRepository) -> None:
        before = far.packs()
        snapshot_id = far.back_up("a", a=noise("a", 100_000))
        name = f"{SNAPSHOTS}/{snapshot_id.hex()}"
        far.memory.create(f"{DRAFTS}/{snapshot_id.hex()}", far.memory.read(name))
        far.memory.delete(name)
        kept = far.packs()
        result = far.prune(margin_s=0)
        assert (result.drafts, result.marked_packs) == (1, 0)
        far.prune(margin_s=0)
        assert far.packs() == kept > before

    def test_the_draft_of_a_published_snapshot_is_deleted(self, far: FarRepository) -> None:
        snapshot_id = far.back_up("a", a=b"a")
        name = f"{SNAPSHOTS}/{snapshot_id.hex()}"
        far.memory.create(f"{DRAFTS}/{snapshot_id.hex()}", far.memory.read(name))
        assert far.prune().drafts == 0
        assert far.names(DRAFTS) == []

    def test_a_draft_without_its_data_protects_nothing(self, far: FarRepository) -> None:
        snapshot_id = far.back_up("a", a=noise("a", 100_000))
        name = f"{SNAPSHOTS}/{snapshot_id.hex()}"
        far.memory.create(f"{DRAFTS}/{snapshot_id.hex()}", far.memory.read(name))
        far.memory.delete(name)
        for pack in sorted(far.packs()):
            if pack.startswith("packs/"):
                far.memory.delete(pack)
        assert far.prune(margin_s=0).drafts == 1

    def test_a_damaged_draft_ends_a_prune_and_the_message_says_how_to_drop_it(
        self, far: FarRepository, unneeded: set[str]
    ) -> None:
        far.memory.create(f"{DRAFTS}/{'0' * 64}", b"no snapshot")
        wanted = (
            "draft 000000000000, .* nothing was removed.*`casfs prune --drop-draft 000000000000`"
        )
        with pytest.raises(DraftUnreadableError, match=wanted):
            far.prune()

    def test_a_damaged_draft_is_dropped_by_name_once_it_is_older_than_the_margin(
        self, far: FarRepository, unneeded: set[str]
    ) -> None:
        name = f"{DRAFTS}/{'0' * 64}"
        far.memory.create(name, b"no snapshot")
        far.memory.create(f"{DRAFTS}/{'01' * 32}", b"no snapshot")
        self.drop(far, "01")
        with pytest.raises(NotFoundError, match="no draft has the id '02'"):
            self.drop(far, "02")
        far.now_ns += HOUR_NS // 2
        with pytest.raises(RefusedError, match="is younger than 1 h"):
            self.drop(far, "000", margin_s=None)
        far.now_ns += HOUR_NS // 2
        self.drop(far, "000", margin_s=None)
        assert far.names(DRAFTS) == []
        assert far.memory.read(f"damaged/{'0' * 64}") == b"no snapshot"
        assert far.prune().marked_packs == len(unneeded)

    def drop(self, far: FarRepository, prefix: str, margin_s: float | None = 0) -> None:
        with far.pruning() as pruner:
            drop_draft(pruner._repository, prefix, margin_s)

    def leave_draft(self, far: FarRepository, name: str = "a") -> None:
        """Leave the draft of a writer that died before it published."""
        far.source(name, a=noise(name, 100_000))
        snapshot_id = far.back_up(name)
        snapshot = f"{SNAPSHOTS}/{snapshot_id.hex()}"
        far.memory.create(f"{DRAFTS}/{snapshot_id.hex()}", far.memory.read(snapshot))
        far.memory.delete(snapshot)

    def test_an_abandoned_draft_is_dropped_and_its_data_by_later_prunes(
        self, far: FarRepository
    ) -> None:
        far.back_up("kept", kept=b"kept")
        kept = far.packs()
        self.leave_draft(far)
        far.now_ns += 7 * 24 * HOUR_NS - HOUR_NS
        assert far.prune().dropped_drafts == 0
        far.now_ns += 2 * HOUR_NS
        with far.pruning(dry_run=True) as pruner:
            assert pruner.estimate(pruner.plan()).dropped_drafts == 1
        result = far.prune()
        assert (result.drafts, result.dropped_drafts, result.marked_packs) == (1, 1, 0)
        assert far.names(DRAFTS) == [] and far.packs() > kept
        assert far.prune().marked_packs > 0
        far.now_ns += HOUR_NS
        far.prune()
        assert far.packs() == kept

    def test_the_draft_of_a_writer_that_is_seen_is_not_abandoned(self, far: FarRepository) -> None:
        presence = TestPresence().show(far, LockMode.SHARED)
        self.leave_draft(far)
        far.now_ns += 8 * 24 * HOUR_NS
        presence._write()
        assert far.prune().dropped_drafts == 0
        presence.end()
        assert far.prune().dropped_drafts == 1

    def test_a_forgotten_snapshot_takes_its_draft_with_it(self, far: FarRepository) -> None:
        snapshot_id = far.back_up("a", a=b"a")
        name = f"{SNAPSHOTS}/{snapshot_id.hex()}"
        far.memory.create(f"{DRAFTS}/{snapshot_id.hex()}", far.memory.read(name))
        far.forget(snapshot_id)
        assert far.names(DRAFTS) == []


class TestPresence:
    def show(self, far: FarRepository, mode: LockMode) -> Presence:
        """Write the presence object of another process, without a thread that refreshes it."""
        presence = Presence(far.storage, StorageClock(far.storage), mode, "other", "other")
        presence._write()
        return presence

    def test_packs_that_a_running_writer_may_have_stored_are_not_marked(
        self, far: FarRepository
    ) -> None:
        presence = self.show(far, LockMode.SHARED)
        far.forget(far.back_up("a", a=noise("a", 100_000)))
        result = far.prune()
        assert result.marked_packs == 0
        assert result.in_flight_packs > 0 and result.in_flight_bytes > 100_000
        presence.end()
        result = far.prune()
        assert result.marked_packs > 0 and result.in_flight_packs == 0

    def test_a_stale_writer_delays_nothing(self, far: FarRepository) -> None:
        self.show(far, LockMode.SHARED)
        far.forget(far.back_up("a", a=noise("a", 100_000)))
        far.now_ns += HOUR_NS
        assert far.prune().marked_packs > 0

    def test_a_forged_writer_from_long_ago_holds_packs_for_a_week_at_most(
        self, far: FarRepository, unneeded: set[str]
    ) -> None:
        forged = LockRecord(LockMode.SHARED, "backup", "evil", 1, 1, since_ns=1)
        name = f"presence/{'0' * 32}"
        far.memory.write(name, msgspec.json.encode(forged))
        assert far.prune().marked_packs == 0
        far.now_ns += 8 * 24 * HOUR_NS
        far.memory.write(name, msgspec.json.encode(forged))
        assert far.prune().marked_packs == len(unneeded)

    def test_packs_stay_longer_for_a_reader_that_is_at_work(
        self, far: FarRepository, unneeded: set[str]
    ) -> None:
        presence = self.show(far, LockMode.READER)
        far.prune()
        far.now_ns += 2 * HOUR_NS
        presence._write()
        result = far.prune()
        assert result.removed_packs == 0 and result.waiting_packs == len(unneeded)
        far.now_ns += 23 * HOUR_NS
        presence._write()
        assert far.prune().removed_packs == len(unneeded)
        presence.end()

    def test_old_presence_objects_are_deleted(self, far: FarRepository) -> None:
        self.show(far, LockMode.READER)
        far.now_ns += 25 * HOUR_NS
        far.prune()
        assert far.names("presence") == []


def test_a_credential_that_may_not_delete_prunes_nothing_and_says_so(
    far: FarRepository, unneeded: set[str]
) -> None:
    far.prune()
    far.now_ns += HOUR_NS
    before = far.packs()

    def denied(call: Call) -> StorageDeniedError:
        return StorageDeniedError("delete", call.name, PermissionError(13, "denied"))

    with far.pruning() as pruner:
        far.storage.script.failures.append(
            Failure(lambda call: call.method == "delete", denied, times=1000)
        )
        with pytest.raises(StorageDeniedError):
            pruner.prune()
    assert far.packs() == before
    far.storage.script.failures.clear()
    assert far.prune().removed_packs == len(unneeded)
    far.require_whole()


def test_a_pack_that_is_stored_again_has_another_name(far: FarRepository) -> None:
    far.forget(far.back_up("a", a=noise("a", 100_000)))
    first = {name for name in far.packs() if name.startswith("packs/")}
    far.prune(margin_s=0)
    far.prune(margin_s=0)
    far.back_up("a")
    again = {name for name in far.packs() if name.startswith("packs/")}
    assert len(first) == len(again) == 1 and first.isdisjoint(again)


def test_more_packs_than_fit_into_a_notice_are_named_in_several() -> None:
    numbers = range(MAX_NOTICE_PACKS + 1)
    packs = {PackRef(PackId(n.to_bytes(32, "big")), n % 7 == 0) for n in numbers}
    notices = list(notices_of(5, packs))
    assert len(notices) == 2 and {notice.time_s for notice in notices} == {5}
    assert set().union(*(notice.pack_refs() for notice in notices)) == packs
    assert all(len(encode_notice(notice)[1]) < MAX_NOTICE_BYTES // 4 for notice in notices)


def test_prunes_together_mark_no_more_packs_than_notices_may_name(
    far: FarRepository, unneeded: set[str]
) -> None:
    assert len(unneeded) == 2
    assert far.prune(most_marked=1).marked_packs == 1
    assert far.prune(most_marked=1).marked_packs == 0
    far.now_ns += HOUR_NS
    assert far.prune(most_marked=1).removed_packs == 1
    assert far.prune(most_marked=1).marked_packs == 1
    far.require_whole()


def test_too_many_notices_end_a_prune_and_a_backup_before_they_change_anything(
    far: FarRepository, unneeded: set[str]
) -> None:
    for number in range(MAX_NOTICES + 1):
        far.memory.write(f"condemned/{number:064x}", b"junk")
    before = far.packs()
    with pytest.raises(TooManyNoticesError, match="below condemned/ that no prune of yours"):
        far.prune()
    with pytest.raises(TooManyNoticesError):
        far.back_up("kept")
    assert far.packs() == before


def test_too_many_notices_keep_no_new_host_from_reading(far: FarRepository) -> None:
    far.back_up("kept", kept=noise("kept", 100_000))
    junk = [f"condemned/{number:064x}" for number in range(MAX_NOTICES + 1)]
    for name in junk:
        far.memory.write(name, b"junk")
    for name in far.names("deltas"):
        far.memory.delete(name)
    far.require_whole()
    with open_for_reading(far.host("new")) as repository:
        # Which packs a prune removes is unknown, so a writer of this machine must rely on none.
        packs = {record.ordinal for record in repository.store.index.packs()}
        assert repository.store.index.untrusted_packs() == packs
    for name in junk:
        far.memory.delete(name)
    with far.writing("new") as repository:
        assert packs and not repository.store.index.untrusted_packs()


def test_notices_that_take_too_much_memory_together_are_not_read() -> None:
    class Large(MemoryStorage):
        """A storage whose objects are large, as its listing says."""

        def list(self, prefix: str) -> Iterator[ListedObject]:
            return (one._replace(size=MAX_NOTICE_BYTES) for one in super().list(prefix))

        def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
            read.append(name)
            return super().read(name, offset, size)

    read: list[str] = []
    storage = Large()
    for number in range(4):
        publish_notice(storage, RemovalNotice.of(number, []))
    with pytest.raises(TooManyNoticesError):
        list_notices(storage)
    assert not read
