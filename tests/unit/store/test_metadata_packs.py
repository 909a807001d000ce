"""Metadata packs: written apart, named by one function, found, rebuilt and removed like every other pack."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from casfs.digest import Digest, PackId, digest_of
from casfs.format.codec import BlobKind
from casfs.format.pack import PackRef
from casfs.index.index import Index
from casfs.storage.memory import MemoryStorage
from casfs.store import pack_builder
from casfs.store import writer as writer_module
from casfs.store.blob_store import BlobStore, pack_name, parse_pack_name
from casfs.store.layout import FORMAT_1, FORMAT_2, PackLayout
from casfs.store.pending_removal import (
    RemovalNotice,
    packs_pending_removal,
    publish_notice,
    read_notices,
    replace_notice,
)
from casfs.store.writer import BlobWriter, WriteStats
from tests.support.stores import add_pack, make_pack, noise, open_store, pack_paths, pack_ref

KIB = 1 << 10

DATA = PackRef(PackId(digest_of(b"data")), False)
META = PackRef(PackId(digest_of(b"meta")), True)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    with open_store(tmp_path) as opened:
        yield opened


Blobs = Sequence[tuple[BlobKind, bytes]]

MIXED: list[tuple[BlobKind, bytes]] = [
    (kind, noise(f"{kind} {number}", 3 * KIB))
    for number in range(20)
    for kind in (BlobKind.DATA, BlobKind.TREE, BlobKind.CONTENT)
]


def write(
    store: BlobStore, blobs: Blobs, layout: PackLayout = FORMAT_2, **options: int
) -> WriteStats:
    writer = BlobWriter(store, layout=layout, **options)  # type: ignore[arg-type]
    try:
        for kind, plain in blobs:
            writer.put(kind, digest_of(plain), plain)
        return writer.finish()
    finally:
        writer.close()


def kinds_of(store: BlobStore) -> dict[PackRef, set[BlobKind]]:
    return {
        pack: {BlobKind(entry.kind) for entry in store.read_directory(pack, size)}
        for pack, size in store.stored_packs()
    }


class TestWriter:
    def test_trees_and_content_lists_go_into_metadata_packs_and_data_into_others(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writer_module, "_BATCH_BLOBS", 4)
        monkeypatch.setattr(pack_builder, "_BUFFER_BYTES", KIB)
        stats = write(store, MIXED, pack_bytes=20 * KIB)
        kinds = kinds_of(store)
        assert stats.packs == len(kinds) > 6
        for pack, found in kinds.items():
            expected = {BlobKind.TREE, BlobKind.CONTENT} if pack.is_meta else {BlobKind.DATA}
            assert found <= expected
        assert {record.pack for record in store.index.packs()} == kinds.keys()
        assert [store.read(digest_of(plain)) for _, plain in MIXED] == [plain for _, plain in MIXED]

    def test_a_writer_of_format_1_mixes_the_kinds_and_has_no_metadata_packs(
        self, store: BlobStore, tmp_path: Path
    ) -> None:
        write(store, MIXED, layout=FORMAT_1)
        ((pack, found),) = kinds_of(store).items()
        assert not pack.is_meta
        assert found == set(BlobKind)
        assert not (tmp_path / "meta").exists()

    def test_a_metadata_pack_is_finished_at_a_size_of_its_own(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pack_builder, "_BUFFER_BYTES", KIB)
        monkeypatch.setattr(pack_builder, "META_PACK_BYTES", 20 * KIB)
        write(store, MIXED)
        sizes = dict(store.stored_packs())
        assert [size > 40 * KIB for pack, size in sizes.items() if not pack.is_meta] == [True]
        meta = [size for pack, size in sizes.items() if pack.is_meta]
        assert len(meta) > 3
        assert max(meta) < 30 * KIB

    def test_the_last_two_packs_share_one_commit_of_the_index(self, tmp_path: Path) -> None:
        steps: list[str] = []
        with open_store(tmp_path, on_step=steps.append) as store:
            store.index.close()
            store.use_index(Index(tmp_path / "index", on_step=steps.append))
            del steps[:]
            write(store, MIXED)
        assert [step for step in steps if step.startswith(("rename", "commit"))] == [
            "rename packs",
            "rename meta",
            "commit index",
        ]

    def test_an_interrupted_last_commit_leaves_packs_that_the_next_opening_indexes(
        self, tmp_path: Path
    ) -> None:
        class StoppedError(Exception):
            pass

        def stop(step: str) -> None:
            if step == "rename meta":
                raise StoppedError

        with open_store(tmp_path, on_step=stop) as store, pytest.raises(StoppedError):
            write(store, MIXED)
        data = [plain for kind, plain in MIXED if kind == BlobKind.DATA]
        with open_store(tmp_path) as store:
            assert [store.read(digest_of(plain)) for plain in data] == data
            assert write(store, MIXED).new_blobs == len(MIXED) - len(data)

    def test_a_dry_run_of_both_kinds_counts_like_a_real_run(self, store: BlobStore) -> None:
        writer = BlobWriter(store, dry_run=True, pack_bytes=20 * KIB, layout=FORMAT_2)
        for kind, plain in [*MIXED, *MIXED]:
            writer.put(kind, digest_of(plain), plain)
        dry = writer.finish()
        assert list(store.stored_packs()) == []
        real = write(store, MIXED)
        assert (dry.new_blobs, dry.new_plain_bytes) == (real.new_blobs, real.new_plain_bytes)

    def test_the_same_blobs_below_the_other_prefix_get_another_name(self, store: BlobStore) -> None:
        """As where a prune repacks a pack of format 1 that has only metadata."""
        trees = [(kind, plain) for kind, plain in MIXED if kind == BlobKind.TREE]
        write(store, trees, layout=FORMAT_1)
        (old,) = store.index.packs()
        store.index.mark_for_removal([old.ordinal])
        write(store, trees)
        _, new = store.index.packs()
        assert new.pack.is_meta
        assert new.pack.id != old.pack.id
        store.index.remove_packs({old.ordinal: old.pack})
        assert all(store.index.are_stored(digest_of(plain) for _, plain in trees))


class TestIndex:
    def test_the_kind_of_a_pack_survives_marks_rebuilds_and_a_new_process(
        self, tmp_path: Path
    ) -> None:
        with open_store(tmp_path) as store:
            write(store, MIXED)
            before = {record.pack for record in store.index.packs()}
            assert {pack.is_meta for pack in before} == {False, True}
            ordinals = [record.ordinal for record in store.index.packs()]
            store.index.mark_verified(ordinals, 7)
            assert {record.pack for record in store.index.packs()} == before
            store.index.mark_damaged(ordinals)
            assert {record.pack for record in store.index.packs()} == before
            assert all(record.is_damaged for record in store.index.packs())
            store.rebuild()
            assert all(record.is_damaged for record in store.index.packs())
        with open_store(tmp_path) as store:
            assert {record.pack for record in store.index.packs()} == before
        shutil.rmtree(tmp_path / "index")
        with open_store(tmp_path) as store:
            assert {record.pack for record in store.index.packs()} == before
            for kind, plain in MIXED:
                place = store.locate(digest_of(plain))
                assert store.index.pack_ref(place.pack).is_meta == (kind != BlobKind.DATA)

    def test_an_orphan_metadata_pack_is_indexed_where_it_lies(self, tmp_path: Path) -> None:
        pack = add_pack(tmp_path, make_pack([b"one", b"two"])[0], is_meta=True)
        with open_store(tmp_path) as store:
            assert [record.pack for record in store.index.packs()] == [pack]
            assert store.read(digest_of(b"two")) == b"two"

    def test_a_pack_below_both_prefixes_is_indexed_once_and_found_below_the_other(
        self, tmp_path: Path
    ) -> None:
        data, _ = make_pack([b"one", b"two"])
        both = [add_pack(tmp_path, data, is_meta) for is_meta in (False, True)]
        found = []
        for _ in range(2):
            with open_store(tmp_path) as store:
                found += [record.pack for record in store.index.packs()]
                assert store.read(digest_of(b"one")) == b"one"
        assert found[0] in both
        assert found == [found[0]] * 2
        (tmp_path / pack_name(found[0])).unlink()
        with open_store(tmp_path) as store:
            assert [one.pack for one in store.index.packs()] == [
                pack for pack in both if pack != found[0]
            ]
            assert store.read(digest_of(b"one")) == b"one"

    def test_a_lost_metadata_pack_loses_only_its_blobs(self, tmp_path: Path) -> None:
        with open_store(tmp_path) as store:
            write(store, MIXED)
        for path in pack_paths(tmp_path):
            if pack_ref(path).is_meta:
                path.unlink()
        with open_store(tmp_path) as store:
            stored = store.index.are_stored(digest_of(plain) for _, plain in MIXED)
            assert stored == [kind == BlobKind.DATA for kind, _ in MIXED]
            write(store, MIXED)
            assert all(store.index.are_stored(digest_of(plain) for _, plain in MIXED))


class TestNames:
    @pytest.mark.parametrize("pack", [DATA, META])
    def test_the_name_of_a_pack_is_parsed_back(self, pack: PackRef) -> None:
        assert parse_pack_name(pack_name(pack)) == pack

    @pytest.mark.parametrize(
        "name",
        [
            "meta",
            "meta/",
            f"meta/{META.id.hex()}",
            f"other/{META.id.hex()[:2]}/{META.id.hex()}",
            f"meta/00/{META.id.hex()}",
            f"meta/{META.id.hex()[:2]}/{META.id.hex().upper()}",
            f"meta/{META.id.hex()[:2]}/x/{META.id.hex()}",
            f"meta/{META.id.hex()[:2]}/{META.id.hex()[:-2]}",
            "meta/zz/zz",
        ],
    )
    def test_another_name_is_no_pack(self, name: str) -> None:
        assert parse_pack_name(name) is None


class TestRemovalNotices:
    def test_a_notice_of_data_packs_is_encoded_as_in_format_1(self) -> None:
        storage = MemoryStorage()
        name = publish_notice(storage, RemovalNotice.of(5, [DATA]))
        assert storage.read(name) == (
            b'{"time_s":5,"packs":["%s"],"writers":null,"readers":[]}\n' % DATA.id.hex().encode()
        )

    def test_a_notice_names_packs_of_both_kinds(self) -> None:
        storage = MemoryStorage()
        notice = RemovalNotice.of(5, [META, DATA])
        name = publish_notice(storage, notice)
        assert read_notices(storage) == {name: notice}
        assert packs_pending_removal(storage) == {DATA, META}

    def test_a_notice_keeps_the_packs_of_either_kind_that_stay(self) -> None:
        storage = MemoryStorage()
        notice = RemovalNotice.of(5, [META, DATA])
        name = publish_notice(storage, notice)
        other_kind = PackRef(DATA.id, True)
        replace_notice(storage, name, notice.only([META, other_kind]))
        ((name, rest),) = read_notices(storage).items()
        assert rest.pack_refs() == {META}
        replace_notice(storage, name, rest.only([]))
        assert read_notices(storage) == {}

    @pytest.mark.parametrize("field", ['"packs":["zz"]', '"packs":[],"meta":["zz"]'])
    def test_a_notice_with_a_name_that_is_not_hexadecimal_is_ignored(self, field: str) -> None:
        storage = MemoryStorage()
        data = b'{"time_s":5,%s}\n' % field.encode()
        storage.write(f"condemned/{digest_of(data).hex()}", data)
        assert read_notices(storage) == {}


def test_a_copy_of_a_blob_is_found_in_a_metadata_pack(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        write(store, MIXED[:1])
        (place,) = pack_paths(tmp_path)
    digest: Digest = digest_of(MIXED[0][1])
    add_pack(tmp_path, make_pack([MIXED[0][1]])[0], is_meta=True)
    with open_store(tmp_path) as store:
        place.unlink()
        assert store.read(digest) == MIXED[0][1]
