"""Small blobs in groups: planned, written, read once for all of them, and lost together at most."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.digest import Digest, digest_of
from casfs.errors import BlobError
from casfs.format.codec import BlobCodec, BlobKind, Codec
from casfs.format.group import Group, join_group
from casfs.format.pack import (
    MAX_PACK_BLOBS,
    TRAILER,
    PackEntry,
    encode_header,
    encode_record_header,
)
from casfs.store.batch_read import ReadPlan, plan_reads, read_run
from casfs.store.blob_store import BlobStore, pack_name
from casfs.store.groups import GroupCache
from casfs.store.layout import FORMAT_1, FORMAT_2, NewBlob, PackLayout, encode_records
from casfs.store.pack_shares import PackShare, stored_bytes
from tests.support.stores import (
    add_pack,
    flip,
    noise,
    open_store,
    pack_paths,
    pack_ref,
    store_blobs,
)

KIB = 1 << 10
TEXTS = [f"text number {number} ".encode() * 20 for number in range(100)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    with open_store(tmp_path) as opened:
        yield opened


def entries(store: BlobStore) -> list[PackEntry]:
    (found,) = store.stored_packs()
    return store.read_directory(*found)


def records(*plains: bytes, layout: PackLayout = FORMAT_2) -> list[list[bytes]]:
    blobs = [NewBlob(BlobKind.DATA, digest_of(plain), plain) for plain in plains]
    found = encode_records(BlobCodec(3), blobs, layout)
    return [[blob.plain for blob in record.blobs] for record in found]


class TestPlan:
    def test_small_blobs_share_a_record_and_large_ones_have_their_own(self) -> None:
        large = b"a large text " * 20 * KIB
        assert records(TEXTS[0], large, TEXTS[1]) == [[large], [TEXTS[0], TEXTS[1]]]

    def test_groups_of_a_batch_have_similar_sizes_below_the_limit(self) -> None:
        plains = [b"%06d" % number * 100 for number in range(150)]
        layout = PackLayout(group_bytes=40_000)
        sizes = [sum(map(len, found)) for found in records(*plains, layout=layout)]
        assert len(sizes) == 3 and max(sizes) <= 40_000 and min(sizes) == 30_000
        assert [plain for found in records(*plains, layout=layout) for plain in found] == plains

    def test_tiny_blobs_are_grouped_up_to_the_number_that_a_reader_accepts(self) -> None:
        found = records(*(b"%05d" % number for number in range(600)))
        assert [len(record) for record in found] == [256, 256, 88]

    def test_format_1_has_no_groups(self) -> None:
        assert records(*TEXTS, layout=FORMAT_1) == [[text] for text in TEXTS]

    def test_trees_and_content_lists_are_not_grouped(self) -> None:
        kinds = [BlobKind.TREE, BlobKind.CONTENT, BlobKind.TREE]
        blobs = [
            NewBlob(kind, digest_of(text), text) for kind, text in zip(kinds, TEXTS, strict=False)
        ]
        found = encode_records(BlobCodec(3), blobs, FORMAT_2)
        assert [record.blobs for record in found] == [[blob] for blob in blobs]

    def test_blobs_whose_digests_have_different_keys_are_not_in_one_group(self) -> None:
        blobs = [
            NewBlob(BlobKind.DATA, digest_of(text), text, number % 2)
            for number, text in enumerate(TEXTS)
        ]
        for record in encode_records(BlobCodec(3), blobs, FORMAT_2):
            assert len({blob.domain for blob in record.blobs}) == 1 < len(record.blobs)

    def test_small_blobs_that_do_not_compress_together_are_raw(self) -> None:
        plains = [noise(f"{number}", 1000) for number in range(10)]
        blobs = [NewBlob(BlobKind.DATA, digest_of(plain), plain) for plain in plains]
        found = encode_records(BlobCodec(3), blobs, FORMAT_2)
        assert [(one.codec, one.payload) for one in found] == [(Codec.RAW, p) for p in plains]

    def test_large_content_that_does_not_compress_is_stored_without_trying(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        codec = BlobCodec(3)
        compressed: list[bytes] = []
        real = codec.encode_many

        def watched(plains: list[bytes]) -> list[tuple[Codec, bytes]]:
            compressed.extend(plains)
            return real(plains)

        monkeypatch.setattr(codec, "encode_many", watched)
        photo, text = noise("photo", 300 * KIB), b"a long text " * 30 * KIB
        blobs = [NewBlob(BlobKind.DATA, digest_of(plain), plain) for plain in (photo, text)]
        found = {one.blobs[0].plain: one.codec for one in encode_records(codec, blobs, FORMAT_2)}
        assert found == {photo: Codec.RAW, text: Codec.ZSTD} and compressed == [text]


class TestReading:
    def test_every_blob_of_a_group_is_read_with_one_read_of_the_pack(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store_blobs(store, TEXTS, layout=FORMAT_2)
        reads: list[int] = []
        real = store.storage.read

        def read(name: str, offset: int, size: int) -> bytes:
            reads.append(offset)
            return real(name, offset, size)

        monkeypatch.setattr(store.storage, "read", read)
        assert [store.read(digest_of(text)) for text in TEXTS] == TEXTS
        assert len(reads) == 1

    def test_a_batch_returns_the_wanted_blobs_of_groups(self, store: BlobStore) -> None:
        store_blobs(store, [*TEXTS, b"big " * 100 * KIB], layout=PackLayout(group_bytes=8 * KIB))
        wanted = {digest_of(text): len(text) for text in TEXTS[::3]}
        found: dict[Digest, bytes] = {}
        for run in plan_reads(store, wanted, ReadPlan.of(store.storage)):
            found |= read_run(store, run)
        assert found == {digest_of(text): text for text in TEXTS[::3]}

    def test_a_small_group_is_read_without_blocking(self, store: BlobStore) -> None:
        store_blobs(store, TEXTS, layout=FORMAT_2)
        ((pack, _),) = store.stored_packs()
        store.storage.read(pack_name(pack), 0, 1)
        assert store.read_nonblocking(digest_of(TEXTS[5]), 64 * KIB) == TEXTS[5]

    def test_a_group_that_was_read_answers_whatever_its_stored_size(self, store: BlobStore) -> None:
        store_blobs(store, TEXTS, layout=FORMAT_2)
        assert store.read_nonblocking(digest_of(TEXTS[5]), 1) is None
        store.read(digest_of(TEXTS[6]))
        assert store.read_nonblocking(digest_of(TEXTS[5]), 1) == TEXTS[5]

    def test_a_nonblocking_read_decodes_a_group_that_is_larger_than_a_blob_may_be(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        single = noise("single", 300 * KIB)
        store_blobs(store, [*TEXTS, single], layout=FORMAT_2)
        monkeypatch.setattr(store.storage, "read_nonblocking", store.storage.read)
        assert store.locate(digest_of(TEXTS[0])).stored_bytes > 100
        assert store.read_nonblocking(digest_of(TEXTS[0]), 100) == TEXTS[0]
        assert store.read_nonblocking(digest_of(single), 100) is None

    def test_the_cache_of_groups_is_bounded_in_bytes(self) -> None:
        cache = GroupCache(max_bytes=25 * KIB)
        groups = [Group(join_group([bytes(10 * KIB)])) for _ in range(3)]
        pack = pack_ref(Path("packs/00") / bytes(32).hex()).id
        for number, group in enumerate(groups):
            cache.put(pack, number, group)
        assert [cache.get(pack, number) for number in range(3)] == [None, *groups[1:]]
        cache.drop(pack, 1)
        cache.put(pack, 3, groups[0])
        assert cache.get(pack, 2) is groups[2] and cache.get(pack, 3) is groups[0]

    def test_many_tiny_groups_do_not_take_more_memory_than_the_cache_may(self) -> None:
        cache = GroupCache(max_bytes=1 << 20)
        pack = pack_ref(Path("packs/00") / bytes(32).hex()).id
        tracemalloc.start()
        try:
            for number in range(20_000):
                cache.put(pack, number, Group(join_group([b"%06d" % number])))
            taken_bytes, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert taken_bytes < 2 << 20

    def test_wrong_bytes_that_a_storage_gave_once_are_not_kept(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A raw block of zstd has no checksum, so wrong bytes may decode."""
        plains = [noise(f"{number}", 600) for number in range(4)]
        store_blobs(store, [*plains, b"\0" * 6000], layout=FORMAT_2)
        assert len({entry.offset for entry in entries(store)}) == 1
        real = store.storage.read
        lies = [2000]

        def read(name: str, offset: int, size: int) -> bytes:
            data = bytearray(real(name, offset, size))
            if lies:
                data[lies.pop()] ^= 1
            return bytes(data)

        monkeypatch.setattr(store.storage, "read", read)
        assert store.read(digest_of(plains[0])) == plains[0]
        assert [store.read(digest_of(plain)) for plain in plains] == plains


class TestDamage:
    def test_a_flipped_byte_costs_at_most_the_blobs_of_one_group(
        self, store: BlobStore, tmp_path: Path
    ) -> None:
        store_blobs(store, TEXTS, layout=PackLayout(group_bytes=8 * KIB))
        found = entries(store)
        hit = found[len(found) // 2]
        (path,) = pack_paths(tmp_path)
        flip(path, hit.offset + hit.stored_bytes // 2)
        for entry, text in zip(found, TEXTS, strict=True):
            if entry.offset != hit.offset:
                assert store.read(digest_of(text)) == text
            else:
                with pytest.raises(BlobError):
                    store.read(digest_of(text))

    def test_a_scan_finds_every_blob_of_groups_without_the_directory(
        self, store: BlobStore, tmp_path: Path
    ) -> None:
        store_blobs(store, [*TEXTS, b"big " * 100 * KIB], layout=PackLayout(group_bytes=8 * KIB))
        found = entries(store)
        (path,) = pack_paths(tmp_path)
        flip(path, path.stat().st_size - TRAILER.size - 1)
        ((pack, pack_bytes),) = store.stored_packs()
        assert store.salvage_directory(pack, pack_bytes) == found
        store.rebuild()
        assert [store.read(digest_of(text)) for text in TEXTS] == TEXTS

    def test_a_scan_ends_where_a_hostile_pack_has_more_blobs_than_a_pack_may_have(
        self, store: BlobStore, tmp_path: Path
    ) -> None:
        data = bytearray(encode_header())
        for number in range(300):
            plain = join_group([b"%03d %03d" % (number, blob) for blob in range(256)])
            ((_, payload),) = store.codec.encode_many([plain])
            data += encode_record_header(BlobKind.DATA, Codec.GROUP, len(payload), len(plain))
            data += payload
        pack = add_pack(tmp_path, bytes(data))
        assert len(store.salvage_directory(pack, len(data))) == MAX_PACK_BLOBS


class TestShares:
    def test_the_shares_of_all_blobs_are_the_records_of_the_pack(self, store: BlobStore) -> None:
        added = store_blobs(store, [*TEXTS, noise("raw", 5000)], layout=FORMAT_2).new_stored_bytes
        half, other = PackShare(), PackShare()
        for number, (_, location) in enumerate(store.index.blobs()):
            (half if number % 2 else other).add(location)
        (record,) = store.index.packs()
        total = PackShare(
            half.single_bytes + other.single_bytes,
            half.grouped_plain_bytes + other.grouped_plain_bytes,
        )
        assert stored_bytes(store.index, {record.ordinal: total}) == added
        parts = [stored_bytes(store.index, {record.ordinal: one}) for one in (half, other)]
        assert abs(sum(parts) - added) <= 1 and min(parts) > 0

    def test_a_blob_in_a_group_counts_for_its_plaintext_at_most(self, store: BlobStore) -> None:
        """The index locates most blobs of this pack elsewhere."""
        store_blobs(store, TEXTS, layout=FORMAT_2)
        (record,) = store.index.packs()
        share = PackShare(0, 10)
        assert share.stored_bytes(share, record) == 10
