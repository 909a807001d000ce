"""Whatever several hosts do and lose, in any order, their indexes come to agree with the packs.


The packs are the model: whatever happened, what counts as stored for a host that has just been opened is
there, and after one look at the packs every index equals one that was rebuilt from them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from casfs.digest import PackId, digest_of
from casfs.format.delta import DeltaBuilder, DeltaPack
from casfs.format.pack import PackEntry, PackRef
from casfs.index import removal
from casfs.index.index import Index
from casfs.store.blob_store import pack_name
from tests.support.hosts import (
    MAINTENANCE,
    READER,
    WRITER,
    Host,
    Place,
    directories,
    require_as_rebuilt,
    require_truthful,
)
from tests.support.stores import noise

HOSTS = st.integers(0, 2)
SKEWS_MS = (0, -120_000, 90_000)
BLOBS = st.lists(st.integers(0, 15), min_size=1, max_size=4)


def content(number: int) -> bytes:
    return noise(f"blob {number}", 60 + number)


@contextmanager
def stopped_after(index: Index, commits: int) -> Iterator[None]:
    """Let every commit after so many fail, as those of a process that died."""
    left = iter(range(commits))

    def stop(step: str) -> None:
        if step == "commit index" and next(left, None) is None:
            raise InterruptedError("killed")

    index.environment._on_step = stop
    try:
        yield
    finally:
        index.environment._on_step = None


class Histories(RuleBasedStateMachine):
    """Three hosts whose clocks differ, and one storage."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="casfs-histories"))
        self.place = Place()
        self.hosts = [
            Host(self.place, self.folder / f"host{n}", skew_ms=skew)
            for n, skew in enumerate(SKEWS_MS)
        ]
        self.lost_removals = False
        self.forged = 0

    def teardown(self) -> None:
        try:
            expected = directories(self.place, self.folder / "model")
            for host in self.hosts:
                with host.open(MAINTENANCE) as opened:
                    require_as_rebuilt(opened, expected)
                    require_truthful(opened)
                    opened.merge(margin_ms=0)
            for host in self.hosts:
                with host.open(WRITER) as opened:
                    require_as_rebuilt(opened, expected)
            with Host(self.place, self.folder / "new").open(WRITER) as opened:
                require_as_rebuilt(opened, expected)
        finally:
            shutil.rmtree(self.folder)

    @rule(number=HOSTS, blobs=BLOBS, publishes=st.booleans())
    def session(self, number: int, blobs: list[int], publishes: bool) -> None:
        """A writer opens, stores, and publishes its delta or dies before that."""
        with self.hosts[number].open(WRITER) as host:
            if not self.lost_removals:
                require_truthful(host)
            host.put([content(blob) for blob in blobs])
            if publishes:
                host.publish()

    @rule(one=HOSTS, two=HOSTS, blobs=BLOBS)
    def two_sessions(self, one: int, two: int, blobs: list[int]) -> None:
        """Two hosts store the same at the same time, in packs of their own."""
        if one == two:
            return
        with self.hosts[one].open(WRITER) as first, self.hosts[two].open(WRITER) as second:
            first.put([content(blob) for blob in blobs] + [noise(f"host {one}", 50)])
            second.put([content(blob) for blob in blobs] + [noise(f"host {two}", 51)])
            second.publish()
            first.publish()

    @rule(
        number=HOSTS,
        chosen=st.integers(0, 1000),
        dies=st.sampled_from(["", "within", "early", "late"]),
        commits=st.integers(0, 5),
    )
    def removal(self, number: int, chosen: int, dies: str, commits: int) -> None:
        """A prune removes a pack; it may die within that, before its delta, or before the deletion."""
        with self.hosts[number].open(MAINTENANCE) as host:
            packs = sorted(host.packs())
            if not packs:
                return
            pack = packs[chosen % len(packs)]
            (ordinal,) = (one.ordinal for one in host.index.packs() if one.pack == pack)
            if dies == "within":
                with suppress(InterruptedError), stopped_after(host.index, commits):
                    host.index.remove_packs({ordinal: pack})
                return
            assert host.index.remove_packs({ordinal: pack})
            if dies == "early":
                return
            host.publish()
            if dies == "late":
                return
            self.place.storage.delete(pack_name(pack))

    @rule(
        number=HOSTS, margin=st.sampled_from([0, 3_600_000]), small=st.sampled_from([200, 1 << 23])
    )
    def merge(self, number: int, margin: int, small: int) -> None:
        with self.hosts[number].open(MAINTENANCE) as host:
            host.merge(margin, small_bytes=small, most_bytes=2000)
            # The packs were listed, and what they are is published.
            if small > 200 and margin == 0:
                self.lost_removals = False

    @rule(number=HOSTS)
    def repair(self, number: int) -> None:
        with self.hosts[number].open(MAINTENANCE) as host:
            host.store.rebuild()
            host.merge(0, from_packs=True)

    @rule(number=HOSTS)
    def read(self, number: int) -> None:
        with self.hosts[number].open(READER) as host:
            for digest, at in list(host.index.blobs())[:5]:
                if host.store.has_pack(host.index.pack_ref(at.pack)):
                    host.store.read(digest)

    @rule(number=HOSTS)
    def lose_index(self, number: int) -> None:
        self.hosts[number].lose_index()

    @rule(chosen=st.integers(0, 1000), flips=st.booleans())
    def lose_delta(self, chosen: int, flips: bool) -> None:
        deltas = self.place.deltas()
        if not deltas:
            return
        name = str(deltas[chosen % len(deltas)])
        if flips:
            data = self.place.storage.read(name)
            self.place.storage.write(name, data[:-1] + bytes([data[-1] ^ 1]))
        else:
            # Who has not seen it does not learn of the removals that it names before the packs are listed.
            self.lost_removals = True
            self.place.storage.delete(name)

    @rule(blobs=BLOBS, removes=st.booleans(), replaces=st.booleans(), late=st.booleans())
    def forge(self, blobs: list[int], removes: bool, replaces: bool, late: bool) -> None:
        """A stranger invents a pack, and says that others are gone or superfluous."""
        self.forged += 1
        builder = DeltaBuilder()
        entries = []
        offset = 32
        for blob in dict.fromkeys(blobs):
            entries.append(PackEntry(digest_of(content(blob)), offset, 40, 60 + blob, 1, 0))
            offset += 56
        name = self.forged.to_bytes(32, "little")
        builder.add(DeltaPack(PackRef(PackId(name), False), 5000, entries))
        if removes:
            packs = self.place.storage.list("packs")
            builder.removed += [PackId(bytes.fromhex(item.name[-64:])) for item in packs]
        if replaces:
            builder.replaced += self.place.deltas()
        builder.is_complete = True
        time_ms = self.place.now_ms() + (3_600_000 if late else -3_600_000)
        delta, data = builder.encode(time_ms)
        self.place.storage.create(str(delta), data)

    @invariant()
    def names_are_those_of_deltas(self) -> None:
        listed = [item.name for item in self.place.storage.list("deltas")]
        assert len(listed) == len(self.place.deltas())


def test_any_history_of_several_hosts_keeps_to_the_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "_ROWS_AT_ONCE", 10)
    run_state_machine_as_test(
        Histories, settings=settings(max_examples=25, stateful_step_count=14, deadline=None)
    )
