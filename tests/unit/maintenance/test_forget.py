"""Forgetting: who is chosen, what is refused, and that nothing else goes."""

from __future__ import annotations

import time

import pytest

from casfs.digest import SnapshotId
from casfs.errors import NotFoundError, RefusedError
from casfs.maintenance.forget import (
    ForgetPlan,
    Grouping,
    forget,
    plan_policy,
    select_by_name,
)
from casfs.maintenance.retention import Policy
from casfs.repository.snapshot_filter import SnapshotFilter
from casfs.repository.snapshots import SnapshotStore
from tests.support.builders import RepositoryFixture
from tests.support.stores import pack_paths

LAST = Policy(last=1)


def made(repo: RepositoryFixture, time_ns: int, **fields: object) -> SnapshotId:
    return repo.publish({b"f": b"%d" % time_ns}, time_ns=time_ns * 10**9, **fields)[0]


def planned(
    repo: RepositoryFixture,
    policy: Policy = LAST,
    grouping: Grouping | None = None,
    choice: SnapshotFilter | None = None,
    allow_all: bool = False,
) -> ForgetPlan:
    with repo.reading() as repository:
        return plan_policy(
            repository, policy, grouping or Grouping(), choice or SnapshotFilter(), allow_all
        )


def gone(plan: ForgetPlan) -> set[SnapshotId]:
    return {candidate.snapshot_id for candidate in plan.forgotten()}


def test_each_host_and_its_paths_are_judged_apart(repo: RepositoryFixture) -> None:
    old = made(repo, 1)
    made(repo, 2)
    made(repo, 3, host="there")
    made(repo, 4, paths=(b"/etc",))
    plan = planned(repo)
    assert gone(plan) == {old}
    assert plan.kept() == 3
    assert len(plan.groups) == 3


def test_grouping_can_be_by_anything_or_nothing(repo: RepositoryFixture) -> None:
    made(repo, 1, host="there", tags=("a",))
    made(repo, 2, tags=("a",))
    made(repo, 3, paths=(b"/etc",), tags=("b",))
    assert planned(repo, grouping=Grouping(False, False, False)).kept() == 1
    assert planned(repo, grouping=Grouping(True, False, False)).kept() == 2
    assert planned(repo, grouping=Grouping(False, False, True)).kept() == 2


def test_forget_touches_only_the_chosen_snapshots(repo: RepositoryFixture) -> None:
    old = made(repo, 1, tags=("a", "b"))
    made(repo, 2)
    made(repo, 3, tags=("a", "b"))
    made(repo, 4, host="there", tags=("a",))
    choice = SnapshotFilter(hosts=("here",), tags=(frozenset("ab"), frozenset("c")), paths=(b".",))
    plan = planned(repo, choice=choice)
    assert gone(plan) == {old}
    assert plan.kept() == 1
    assert planned(repo, choice=SnapshotFilter(paths=(b"/etc",))).groups == {}


def test_rules_that_keep_nothing_of_a_group_are_refused(repo: RepositoryFixture) -> None:
    made(repo, 1, tags=("keep",))
    made(repo, 2, host="there")
    policy = Policy(tags=(frozenset({"keep"}),))
    with pytest.raises(RefusedError, match="host there, paths \\."):
        planned(repo, policy)
    assert planned(repo, policy, allow_all=True).kept() == 1


def test_snapshots_are_named_by_prefix_and_once(repo: RepositoryFixture) -> None:
    first, second = made(repo, 1), made(repo, 2)
    with repo.reading() as repository:
        found = select_by_name(repository, [first.hex()[:8], first.hex()], False)
        assert [candidate.snapshot_id for candidate in found] == [first]
        with pytest.raises(NotFoundError):
            select_by_name(repository, ["nothing"], False)
        with pytest.raises(RefusedError, match="no snapshot would be left"):
            select_by_name(repository, [first.hex(), second.hex()], False)
        assert len(select_by_name(repository, [first.hex(), second.hex()], True)) == 2


def test_forget_removes_snapshots_and_no_pack(repo: RepositoryFixture) -> None:
    made(repo, 1)
    kept = made(repo, 2)
    packs = pack_paths(repo.root)
    with repo.writing() as repository:
        plan = plan_policy(repository, LAST, Grouping(), SnapshotFilter(), False)
        assert forget(repository, plan.forgotten()) == 1
        assert forget(repository, plan.forgotten()) == 1  # to be gone already is no error
        assert repository.snapshots.ids() == [kept]
    assert pack_paths(repo.root) == packs


def test_a_damaged_snapshot_can_be_forgotten_by_name(repo: RepositoryFixture) -> None:
    damaged = made(repo, 1)
    made(repo, 2)
    (repo.root / "snapshots" / damaged.hex()).write_bytes(b"junk")
    with repo.writing() as repository:
        found = select_by_name(repository, [damaged.hex()[:12]], False)
        assert (found[0].snapshot, found[0].time_ns, found[0].tags) == (None, 0, ())
        forget(repository, found)
        assert damaged not in repository.snapshots.ids()


def test_forgetting_a_replacement_does_not_bring_back_the_replaced_snapshot(
    repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a crash leaves it between the two steps of a change of tags."""
    first, snapshot = repo.publish({b"f": b"1"}, time_ns=1)
    other = made(repo, 2)
    with repo.writing() as repository:
        with monkeypatch.context() as patch:
            patch.setattr(SnapshotStore, "delete", lambda *_: None)
            second = repository.snapshots.replace(first, snapshot, tags=("new",))
        assert set(repository.snapshots.ids()) == {first, second, other}
        forget(repository, select_by_name(repository, [second.hex()], False))
        assert repository.snapshots.ids() == [other]


def test_relative_sources_of_different_directories_are_judged_apart(
    repo: RepositoryFixture,
) -> None:
    made(repo, 1, directory=b"/a")
    old = made(repo, 2, directory=b"/b")
    made(repo, 3, directory=b"/b")
    made(repo, 4)
    plan = planned(repo)
    assert gone(plan) == {old}
    assert sorted(key.directory for key in plan.groups) == [b"", b"/a", b"/b"]
    assert planned(repo, grouping=Grouping(paths=False)).kept() == 1


def test_a_snapshot_from_the_future_is_kept_and_saves_no_other(repo: RepositoryFixture) -> None:
    real = [made(repo, 1), made(repo, 2)]
    future = made(repo, 2_000_000_000)
    with repo.reading() as repository:

        def plan(policy: Policy) -> ForgetPlan:
            return plan_policy(
                repository, policy, Grouping(), SnapshotFilter(), False, now_ns=10 * 10**9
            )

        assert gone(plan(LAST)) == {real[0]}
        assert [one.snapshot_id for one in plan(LAST).from_future()] == [future]
        with pytest.raises(RefusedError, match="none of the 2 snapshots"):
            plan(Policy(tags=(frozenset({"none"}),)))


def test_latest_is_from_the_future_only_where_all_are(
    repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(repo, 1)
    future = made(repo, 2_000_000_000)
    with repo.reading() as repository:
        monkeypatch.setattr(time, "time_ns", lambda: 10 * 10**9)
        assert repository.snapshots.resolve("latest")[0] == first
        monkeypatch.setattr(time, "time_ns", lambda: 0)
        assert repository.snapshots.resolve("latest")[0] == first
        monkeypatch.setattr(time, "time_ns", lambda: -(10**12))
        assert repository.snapshots.resolve("latest")[0] == future
