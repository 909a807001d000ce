"""Packs leave an index in several transactions, whatever stops the process or happens in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from casfs.digest import Digest, PackId, digest_of
from casfs.format.delta import DeltaPack
from casfs.format.pack import PackEntry, PackRef
from casfs.index import removal
from casfs.index.delta_notes import DeltaNotes
from casfs.index.index import Index
from casfs.index.schema import IndexedPack

PACKS, BLOBS = 6, 10


def blob(number: int) -> Digest:
    return digest_of(b"blob %d" % number)


def pack(number: int, *blobs: int) -> IndexedPack:
    entries = [PackEntry(blob(n), 32 + 16 * i, 10, 20, 1, 0) for i, n in enumerate(blobs)]
    return PackRef(PackId(digest_of(b"pack %d" % number)), False), 1000 + number, entries


KEPT = [pack(n, *range(n * BLOBS, (n + 1) * BLOBS)) for n in range(PACKS)]
TWICE = pack(PACKS, *range(25, 35))
"""Holds again five blobs each of the packs 2 and 3."""

GOING = {0: KEPT[0][0], 2: KEPT[2][0], 5: KEPT[5][0]}
GONE = [*range(10), *range(20, 25), *range(50, 60)]
STAYING = sorted({*range(60)} - {*GONE})


@pytest.fixture(params=["at once", "in parts"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "in parts":
        remove_in_parts(monkeypatch)
    return str(request.param)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    remove_in_parts(monkeypatch)


def remove_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "_ROWS_AT_ONCE", 9)
    monkeypatch.setattr(removal, "_READ_AT_ONCE", 4)
    monkeypatch.setattr(removal, "_PACKS_AT_ONCE", 2)


class Steps:
    """What happens before each commit of an index, once `armed`."""

    def __init__(self) -> None:
        self.count = 0
        self.before: Callable[[int], None] = lambda number: None
        self.armed = False

    def __call__(self, step: str) -> None:
        if self.armed and step == "commit index":
            self.armed = False
            number, self.count = self.count, self.count + 1
            try:
                self.before(number)
            finally:
                self.armed = True


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
def index(tmp_path: Path, steps: Steps) -> Iterator[Index]:
    opened = Index(tmp_path / "index", on_step=steps, sync=False)
    opened.tracks_deltas = True
    opened.rebuild(tuple)
    opened.add_packs([*KEPT, TWICE])
    steps.armed = True
    yield opened
    opened.close()


def require_removed(index: Index) -> None:
    """Require that exactly what the packs in GOING alone held is gone."""
    assert sorted(index.blobs()) == sorted(
        (d, at) for d, at in index.blobs() if at.pack not in GOING
    )
    assert {digest for digest, _ in index.blobs()} == {blob(n) for n in STAYING}
    assert all(at.pack not in GOING for _, at in index.further_locations())
    assert [one.ordinal for one in index.packs()] == [1, 3, 4, 6]
    assert index.are_stored(map(blob, range(60))) == [n in STAYING for n in range(60)]
    assert not index.has_leaving_packs() and not index.marked_for_removal()
    assert index.partial_packs() == []


def test_removed_packs_take_with_them_what_no_other_pack_holds(way: str, index: Index) -> None:
    ordinals = {digest: at.ordinal for digest, at in index.blobs()}
    assert index.remove_packs(GOING)
    require_removed(index)
    assert all(ordinals[digest] == at.ordinal for digest, at in index.blobs())
    assert index.pack_ref(index.lookup(blob(27)).pack) == TWICE[0]  # type: ignore[union-attr]
    assert set(DeltaNotes(index).removed()) == {ref.id for ref in GOING.values()}


def test_the_removal_of_published_packs_is_no_news(way: str, index: Index) -> None:
    assert index.remove_packs(GOING, is_published=True)
    require_removed(index)
    assert DeltaNotes(index).removed() == []


def test_a_removal_changes_the_counters_that_others_compare(way: str, index: Index) -> None:
    removals, losses = index.removals(), index.loss_epoch()
    assert index.remove_packs(GOING)
    assert index.removals() > removals and index.loss_epoch() == losses
    assert index.remove_packs({1: KEPT[1][0]}, lost=True)
    assert index.loss_epoch() > losses


def test_no_transaction_of_a_removal_touches_more_than_its_share(
    in_parts: None, index: Index, steps: Steps
) -> None:
    seen: list[tuple[int, int, int]] = []

    def look(number: int) -> None:
        copies = sum(1 for _ in index.further_locations())
        seen.append((index.blob_count(), copies, len(index.packs())))

    steps.before = look
    assert index.remove_packs(GOING)
    look(0)
    for before, after in pairwise(seen):
        assert 0 <= before[0] - after[0] <= 9 and before[2] - after[2] <= 2
    assert len(seen) > 60 // 9 + 4


def test_a_pack_that_lost_its_ordinal_ends_a_removal_before_it_changes_anything(
    way: str, index: Index
) -> None:
    before, state = sorted(index.blobs()), (index.removals(), index.loss_epoch())
    assert not index.remove_packs({**GOING, 4: KEPT[3][0]})
    assert not index.remove_packs({**GOING, 77: KEPT[3][0]})
    assert sorted(index.blobs()) == before
    assert (index.removals(), index.loss_epoch()) == state
    assert not index.has_leaving_packs()


def test_nothing_of_packs_that_leave_counts_as_stored_between_two_transactions(
    in_parts: None, index: Index, steps: Steps
) -> None:
    def look(number: int) -> None:
        if number:
            assert index.untrusted_packs() >= set(left := leaving(index))
            assert set(left) <= index.marked_for_removal()
            stored = index.are_stored(map(blob, range(60)))
            if number > 1:  # all packs are noted
                certain = {*range(10), *range(20, 25), *range(50, 60)}
                assert not any(stored[n] for n in certain)
            assert all(stored[n] for n in [*range(10, 20), *range(30, 50)])

    steps.before = look
    assert index.remove_packs(GOING)
    require_removed(index)


def leaving(index: Index) -> list[int]:
    return [one.ordinal for one in index.packs() if one.ordinal in index.marked_for_removal()]


KILLS = range(13)


def test_the_kills_reach_every_step_of_a_removal(
    in_parts: None, index: Index, steps: Steps
) -> None:
    assert index.remove_packs(GOING)
    assert steps.count == len(KILLS) - 1


@pytest.mark.parametrize("kill", KILLS)
def test_a_removal_that_was_killed_is_finished_later(
    in_parts: None, index: Index, steps: Steps, kill: int
) -> None:
    def stop(number: int) -> None:
        if number == kill:
            raise InterruptedError("killed")

    steps.before = stop
    was_killed = False
    try:
        index.remove_packs(GOING)
    except InterruptedError:
        was_killed = True
    assert was_killed == (kill < len(KILLS) - 1)
    steps.armed = False
    losses = index.loss_epoch()
    assert index.has_leaving_packs() == (0 < kill < len(KILLS) - 1)
    index.finish_removals()
    noted = {0: 0, 1: 2}.get(kill, 3)
    if noted == 3:
        require_removed(index)
    else:
        there = {one.ordinal for one in index.packs()}
        assert [n for n in GOING if n in there] == list(GOING)[noted:]
        assert not index.has_leaving_packs()
    if 0 < kill < len(KILLS) - 1:
        assert index.loss_epoch() > losses


def test_a_blob_that_is_stored_again_during_a_removal_is_located_in_its_new_pack_only(
    in_parts: None, index: Index, steps: Steps
) -> None:
    total = len(KILLS) - 1
    for at in range(1, total):
        again = pack(100 + at, *GONE)
        done = False

        def store(number: int, at: int = at, again: IndexedPack = again) -> None:
            nonlocal done
            if number == at:
                index.add_packs([again])
                done = True

        steps.count, steps.before = 0, store
        going = {one.ordinal: one.pack for one in index.packs() if one.pack in GOING.values()}
        if len(going) < 3:
            index.add_packs([KEPT[0], KEPT[2], KEPT[5]])
            going = {one.ordinal: one.pack for one in index.packs() if one.pack in GOING.values()}
        steps.count = 0
        assert index.remove_packs(going)
        assert done
        packs = {one.ordinal for one in index.packs()}
        assert all(found.pack in packs for _, found in index.blobs())
        assert all(found.pack in packs for _, found in index.further_locations())
        assert all(index.are_stored(map(blob, GONE)))
        mine = {one.ordinal: one.pack for one in index.packs() if one.pack == again[0]}
        steps.before = lambda number: None
        assert index.remove_packs(mine)


@pytest.mark.parametrize("at", range(1, len(KILLS) - 1))
def test_an_index_that_is_rebuilt_during_a_removal_keeps_what_it_was_rebuilt_from(
    in_parts: None, index: Index, steps: Steps, at: int
) -> None:
    def rebuild(number: int) -> None:
        if number == at:
            index.rebuild(lambda: [*KEPT, TWICE])

    steps.before = rebuild
    assert not index.remove_packs(GOING)
    assert not index.has_leaving_packs()
    packs = {one.ordinal: one.pack for one in index.packs()}
    assert set(packs.values()) == {one[0] for one in [*KEPT, TWICE]}
    assert all(at.pack in packs for _, at in index.blobs())
    assert {digest for digest, _ in index.blobs()} == {blob(n) for n in range(60)}


@pytest.mark.parametrize("at", range(1, len(KILLS) - 1))
def test_two_processes_that_remove_the_same_packs_leave_nothing_behind(
    in_parts: None, index: Index, steps: Steps, at: int
) -> None:
    found: list[bool] = []

    def remove(number: int) -> None:
        if number == at:
            found.append(index.remove_packs({0: GOING[0], 2: GOING[2]}))

    steps.before = remove
    index.remove_packs(GOING)
    assert len(found) == 1
    require_removed(index)


def test_a_delta_that_is_applied_during_a_removal_adds_nothing_in_its_packs(
    in_parts: None, index: Index, steps: Steps
) -> None:
    partial = pack(50, *range(200, 230))
    notes = DeltaNotes(index)
    (registered,) = notes.register([DeltaPack(*partial)])
    assert registered is not None and registered.needs_rows
    rows = sorted((e.digest, registered.ordinal, *e[1:], 0) for e in partial[2])
    steps.count = 0

    def apply(number: int) -> None:
        if number == 2:
            (again,) = notes.register([DeltaPack(*partial)])
            assert again is not None and not again.needs_rows
            notes.put_rows(rows, {registered.ordinal: partial[0].id})

    steps.before = apply
    assert index.remove_packs({registered.ordinal: partial[0]})
    assert {digest for digest, _ in index.blobs()} == {blob(n) for n in range(60)}
    assert index.partial_packs() == []
