"""Groups of any blobs: all come back; a flipped byte costs at most one group and never gives wrong bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casfs.digest import Digest
from casfs.errors import CasfsError, KeyMissingError
from casfs.format.codec import BlobCodec, BlobKind
from casfs.format.key_derivation import WriteSession
from casfs.format.pack import PackEntry, PackRef
from casfs.index.index import Index
from casfs.storage.memory import MemoryStorage
from casfs.store.batch_read import ReadPlan, plan_reads, read_run
from casfs.store.blob_store import BlobStore, pack_name
from casfs.store.cipher import PackCiphers
from casfs.store.layout import PackLayout
from casfs.store.writer import BlobWriter
from tests.support.encryption import DOMAIN, SESSION

BLOBS = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda word, times: word * times, st.binary(min_size=1, max_size=9), st.integers(1, 60)
    ),
)
PLAINS = st.lists(BLOBS, min_size=1, max_size=30, unique=True)


class _OneSession:
    def session(self, session_id: bytes) -> WriteSession:
        if session_id != SESSION.id:
            raise KeyMissingError("no key of this session")
        return SESSION


class GroupedPack:
    """The blobs of a single pack in memory, encrypted or not."""

    def __init__(
        self, index: Index, plains: list[bytes], encrypted: bool, group_bytes: int
    ) -> None:
        self.storage = MemoryStorage()
        self._index = index
        self._encrypted = encrypted
        store = self.store()
        self.plains = {store.codec.digest(plain): plain for plain in plains}
        writer = BlobWriter(
            store,
            spool_in_memory=True,
            session=(lambda: SESSION) if encrypted else None,
            layout=PackLayout(group_bytes=group_bytes),
        )
        try:
            for digest, plain in self.plains.items():
                writer.put(BlobKind.DATA, digest, plain)
            writer.finish()
        finally:
            writer.close()
        ((self.pack, self.pack_bytes),) = store.stored_packs()
        self.data = self.storage.read(pack_name(self.pack))
        self.entries = store.read_directory(self.pack, self.pack_bytes)

    def store(self) -> BlobStore:
        """Return the store as another process sees it, without anything cached."""
        ciphers = PackCiphers(self.storage, _OneSession()) if self._encrypted else None
        codec = BlobCodec(3, DOMAIN.digest_key if self._encrypted else None)
        return BlobStore(self.storage, self._index, codec, ciphers)

    def flip(self, at: int, mask: int = 0x10) -> None:
        """Replace the pack by one that differs in one byte from what was written."""
        data = bytearray(self.data)
        data[at] ^= mask
        self.storage.write(pack_name(self.pack), data)

    def readable(self, store: BlobStore) -> set[Digest]:
        """Return the blobs that can be read; each read gives what was written."""
        found = set()
        for digest, plain in self.plains.items():
            location = store.index.lookup(digest)
            assert location is not None
            try:
                assert store.read_at(digest, location) == plain
            except CasfsError:
                continue
            found.add(digest)
        return found

    def salvaged(self, store: BlobStore) -> set[PackEntry]:
        """Return the blobs that a scan finds without the directory."""
        try:
            return set(store.salvage_directory(self.pack, self.pack_bytes))
        except KeyMissingError:
            return set()


@contextmanager
def grouped(plains: list[bytes], encrypted: bool, group_bytes: int = 600) -> Iterator[GroupedPack]:
    with tempfile.TemporaryDirectory() as folder:
        index = Index(Path(folder) / "index", sync=False)
        try:
            yield GroupedPack(index, plains, encrypted, group_bytes)
        finally:
            index.close()


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
class TestAnyGroups:
    @settings(max_examples=30, deadline=None)
    @given(plains=PLAINS, group_bytes=st.integers(1, 3000))
    def test_any_blobs_come_back_from_groups_of_any_size(
        self, encrypted: bool, plains: list[bytes], group_bytes: int
    ) -> None:
        with grouped(plains, encrypted, group_bytes) as pack:
            assert pack.readable(pack.store()) == pack.plains.keys()
            assert pack.salvaged(pack.store()) == set(pack.entries)
            store = pack.store()
            wanted = {digest: len(plain) for digest, plain in pack.plains.items()}
            found: dict[Digest, bytes] = {}
            for run in plan_reads(store, wanted, ReadPlan.of(store.storage)):
                found |= read_run(store, run)
            assert found == pack.plains

    def test_each_flipped_byte_of_a_pack_costs_at_most_one_group(self, encrypted: bool) -> None:
        plains = [b"%d text that shrinks " % number * 6 for number in range(12)]
        with grouped(plains, encrypted) as pack:
            entries = pack.entries
            groups = {entry.offset for entry in entries}
            assert 2 <= len(groups) < len(entries)
            for at in range(len(pack.data)):
                pack.flip(at)
                hit = {e.digest for e in entries if e.offset <= at < e.offset + e.stored_bytes}
                # The header of an encrypted pack has what its key is derived from.
                in_header = at < entries[0].offset - 16
                readable = pack.readable(pack.store())
                assert readable >= pack.plains.keys() - hit or (in_header and encrypted)
                # A scan needs the record's header, too.
                lost = {
                    e.digest for e in entries if e.offset - 16 <= at < e.offset + e.stored_bytes
                }
                salvaged = {entry.digest for entry in pack.salvaged(pack.store())}
                if not in_header:
                    assert salvaged >= pack.plains.keys() - lost


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_of_groups_never_gives_wrong_bytes(encrypted: bool, data: st.DataObject) -> None:
    plains = data.draw(PLAINS)
    with grouped(plains, encrypted) as pack:
        at = data.draw(st.integers(0, len(pack.data) - 1))
        mask = data.draw(st.integers(1, 255))
        pack.flip(at, mask)
        store = pack.store()
        pack.readable(store)
        for entry in pack.salvaged(store):
            plain = store.read_entry(PackRef(pack.pack.id, pack.pack.is_meta), entry)
            assert pack.plains.get(entry.digest, plain) == plain
