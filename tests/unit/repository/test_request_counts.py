"""How many requests the everyday commands make to a remote repository: people pay for them, and wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from casfs.maintenance.check import Checker
from casfs.maintenance.forget import Candidate, forget
from casfs.maintenance.prune_plan import PruneOptions
from casfs.maintenance.prune_result import PruneResult
from casfs.maintenance.shared_prune import SharedPruner
from casfs.monitor import RecordingMonitor
from casfs.repository import snapshot_listing
from casfs.repository.opening import open_for_maintenance, open_for_reading
from casfs.repository.repository import Repository
from casfs.storage.locks import LockMode
from tests.support.far import FarRepository
from tests.support.storage_double import Call
from tests.support.stores import noise

DIRECTORIES = 17
HUNG_S = 60


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of 17 directories with a few files each: the current one.

    An absolute path would record the directories above it, such as /tmp, which others change.
    """
    root = tmp_path / "source"
    for directory in range(DIRECTORIES):
        (root / f"{directory}").mkdir(parents=True)
        for number in range(5):
            (root / f"{directory}" / f"{number}").write_bytes(noise(f"{directory} {number}", 3000))
    monkeypatch.chdir(root)
    return Path()


@pytest.fixture
def far(own_home: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> FarRepository:
    """A repository with snapshots of the source that this host made.

    The files were too new for the first backup to trust that they are unchanged.
    """
    far = FarRepository.create(monkeypatch)
    for _ in range(2):
        far.back_up(source)
    far.requests()
    return far


def beside_listing(requests: list[str]) -> list[str]:
    return [one for one in requests if not one.startswith("list ")]


def walk(far: FarRepository) -> int:
    """Read the whole tree of the latest snapshot, as `find` does; return the number of entries."""
    with far.reading() as repository:
        root = repository.snapshots.resolve("latest")[1].root
        return sum(1 for _ in repository.trees.walk(root))


def test_an_unchanged_backup_makes_few_requests_and_reads_no_pack(
    far: FarRepository, source: Path
) -> None:
    far.back_up(source)
    requests = far.requests()
    # The process of a command reads `config` too, which this one has read already. To ask twice for the
    # parent snapshot is cheap and saves two round trips.
    assert len(beside_listing(requests)) + 1 <= 10
    assert len(requests) + 1 <= 17
    assert not any(one.endswith((" packs", " meta")) for one in requests)
    assert requests.count("create snapshots") == 1


def test_an_unchanged_backup_looks_in_one_round_trip(far: FarRepository, source: Path) -> None:
    together = threading.Barrier(2, timeout=HUNG_S)
    drafts: list[str] = []

    def meet(call: Call) -> None:
        if call.method == "create" and call.name.startswith("drafts/"):
            drafts.append(call.name)
        if drafts and call.method == "list" and call.name in ("condemned", "deltas"):
            together.wait()

    far.storage.script.before = meet
    far.back_up(source)
    assert drafts
    assert not together.broken


def test_an_unchanged_backup_whose_parent_was_forgotten_looks_in_order_before_it_is_published(
    far: FarRepository, source: Path
) -> None:
    def forget(call: Call) -> None:
        if call.method == "create" and call.name.startswith("drafts/"):
            for name, _, _ in list(far.storage.inner.list("snapshots")):
                far.storage.inner.delete(name)

    far.storage.script.before = forget
    far.back_up(source)
    requests = far.requests()
    draft, snapshot = requests.index("create drafts"), requests.index("create snapshots")
    look = requests[draft:snapshot]
    assert look.count("list condemned") == look.count("list deltas") == 2
    assert look[-2:] == ["list condemned", "list deltas"]


def test_a_backup_of_a_change_reads_no_pack(far: FarRepository, source: Path) -> None:
    (source / "3" / "new").write_bytes(noise("new", 3000))
    far.back_up(source)
    requests = far.requests()
    assert not any(one.startswith("read ") for one in requests)
    assert len(beside_listing(requests)) + 1 <= 11


def test_a_walk_through_a_tree_that_this_host_stored_reads_nothing(far: FarRepository) -> None:
    assert walk(far) == 6 * DIRECTORIES
    assert sorted(far.requests()) == ["list deltas", "list snapshots"]


def test_a_new_host_walks_a_tree_with_few_requests_and_then_with_none(
    far: FarRepository, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_home / "another cache"))
    walk(far)
    cold = far.requests()
    assert cold.count("read meta") <= 2
    assert len(cold) <= 8
    walk(far)
    assert sorted(far.requests()) == ["list deltas", "list snapshots"]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_few_requests_of_each_verb_are_made_one_after_the_other(
    far: FarRepository, source: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests at the same time cost one round trip, and round trips are what a distance costs.

    A busy machine starts threads late, so each limit is 2 or 3 above what a quiet one needs.
    """
    assert far.round_trips(lambda: far.back_up(source)) <= 9
    (source / "3" / "new").write_bytes(noise("new", 3000))
    assert far.round_trips(lambda: far.back_up(source)) <= 12
    assert far.round_trips(lambda: walk(far)) <= 4
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_home / "another cache"))
    assert far.round_trips(lambda: walk(far)) <= 9


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_few_requests_of_maintenance_are_made_one_after_the_other(
    far: FarRepository, source: Path
) -> None:
    """The number of packs, blobs and snapshots does not count.

    The limits of a prune are 4 above what a quiet machine needs, the others 2 as above.
    """
    for number in range(24):
        (source / "large").mkdir(exist_ok=True)
        (source / "large" / f"{number}").write_bytes(noise(f"large {number}", 300_000))
    far.back_up(source)
    for number in range(0, 24, 2):
        (source / "large" / f"{number}").unlink()
    for _ in range(4):
        far.back_up(source)
    assert far.round_trips(lambda: check(far)) <= 11
    assert far.round_trips(lambda: forget_all_but_one(far)) <= 8
    done: list[PruneResult] = []
    assert far.round_trips(lambda: done.append(prune(far))) <= 26
    assert done[-1].repacked_packs >= 1
    assert far.round_trips(lambda: done.append(prune(far, margin_s=0))) <= 35
    assert done[-1].removed_packs >= 2
    check(far)


def forget_all_but_one(far: FarRepository) -> None:
    with open_for_maintenance(far.place, "forget", mode=LockMode.SHARED) as repository:
        found = list(repository.snapshots.iterate())[:-1]
        assert forget(repository, [Candidate(*one) for one in found]) == 6


def prune(far: FarRepository, margin_s: float | None = None) -> PruneResult:
    with open_for_maintenance(far.place, "prune") as repository:
        return SharedPruner(repository, PruneOptions(margin_s=margin_s), RecordingMonitor()).prune()


def check(far: FarRepository) -> None:
    with open_for_reading(far.place, reader="check", may_write_index=True) as repository:
        assert not Checker(repository, RecordingMonitor()).check().damage


def test_a_listing_of_the_snapshots_that_was_made_at_the_opening_is_used_once_and_soon(
    far: FarRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    with far.reading() as repository:
        ids = repository.snapshots.ids()
        assert far.requests().count("list snapshots") == 1
        far.storage.delete(f"snapshots/{ids[0].hex()}")
        assert repository.snapshots.ids() == ids[1:]
        assert far.requests().count("list snapshots") == 1
    monkeypatch.setattr(snapshot_listing, "_FRESH_S", 0.0)
    with far.reading() as repository:
        far.requests()
        repository.snapshots.ids()
        assert far.requests().count("list snapshots") == 1


def test_a_restore_verifies_no_pack_on_its_way(far: FarRepository) -> None:
    with far.reading() as repository:
        root = repository.snapshots.resolve("latest")[1].root
        for _, node in repository.trees.walk(root):
            for digest in repository.content(node).blobs() if node.content else ():
                repository.store.read(digest)
        far.requests()
    assert far.requests() == []


def test_snapshots_are_read_at_the_same_time(
    far: FarRepository, source: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(6):
        far.back_up(source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_home / "another cache"))
    far.requests()
    together = threading.Barrier(8, timeout=HUNG_S)

    def meet(call: Call) -> None:
        if call.method == "read" and call.name.startswith("snapshots/"):
            with suppress(threading.BrokenBarrierError):
                together.wait()

    far.storage.script.before = meet
    with far.reading() as repository:
        assert len(list(repository.snapshots.iterate())) == 8
    assert not together.broken
    assert far.requests().count("read snapshots") == 8


@pytest.mark.parametrize("change", [lambda data: b"", lambda data: data[:-1] + b"?"])
def test_damaged_and_missing_snapshots_are_left_out_where_several_are_read_at_once(
    far: FarRepository,
    source: Path,
    own_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[bytes], bytes],
) -> None:
    for _ in range(2):
        far.back_up(source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_home / "another cache"))
    first, second, *_ = [name for name, _, _ in far.storage.inner.list("snapshots")]
    far.storage.inner.write(first, change(far.storage.inner.read(first)))

    def remove(call: Call) -> None:
        if call.method == "read" and call.name == second:
            far.storage.inner.delete(second)

    far.storage.script.before = remove
    with far.reading() as repository:
        assert len(list(repository.snapshots.iterate())) == 2
    assert "run `casfs check`" in caplog.text


def test_an_open_repository_is_closed_without_a_request(far: FarRepository) -> None:
    repository: Repository = far.reading()
    far.requests()
    repository.close()
    assert far.requests() == []
