"""The files cache: which entries it returns, which it does not trust, and what others can read in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from casfs.backup import file_cache as file_cache_module
from casfs.backup.file_cache import FileCache
from casfs.digest import Digest, PackId, keyed_digest
from casfs.format.codec import BlobKind
from casfs.format.pack import PackEntry, PackRef
from casfs.format.tree import CaptureState, Node, NodeType
from casfs.index.index import Index
from casfs.index.schema import IndexedPack
from casfs.trees.content import EXTENT, HOLE
from tests.support.builders import entry
from tests.support.encryption import DOMAIN
from tests.support.stores import noise

DAY_S = 86_400
CHUNKS = [keyed_digest(noise(f"chunk {n}", 10), DOMAIN.digest_key) for n in range(3)]
CONTENT = b"".join(EXTENT.pack(10, digest) for digest in (*CHUNKS[:2], HOLE))
PATH = b"home/me/a very special name"


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    index = Index(tmp_path / "index", sync=False)
    index.rebuild(tuple)
    index.add_packs([pack(CHUNKS[0]), pack(CHUNKS[1]), pack(CHUNKS[2])])
    yield index
    index.close()


def pack(digest: Digest) -> IndexedPack:
    return (
        PackRef(PackId(digest[::-1]), False),
        1000,
        [PackEntry(digest, 96, 34, 10, BlobKind.DATA, 16)],
    )


def node(**fields: Any) -> Node:
    known: dict[str, Any] = {"content": CONTENT, "size": 30, "inode": 7}
    return entry(PATH.rpartition(b"/")[2], **(known | fields))


def stat_of(node: Node, **changes: int) -> os.stat_result:
    """Return the stat of the file that a node was made from."""

    class Result:
        st_ino = changes.get("inode", node.inode)
        st_size = changes.get("size", node.size)
        st_mtime_ns = changes.get("mtime_ns", node.mtime_ns)
        st_ctime_ns = changes.get("ctime_ns", node.ctime_ns)

    return Result()  # type: ignore[return-value]


def file_cache(index: Index, key: bytes = DOMAIN.file_cache_key) -> FileCache:
    return FileCache(index, key, index.loss_epoch())


def remembered(index: Index, *nodes: Node, confirm: bool = True) -> None:
    """Do what a backup does that stored these files."""
    found = file_cache(index)
    for one in nodes or (node(),):
        found.put(PATH, one)
    if confirm:
        found.commit()
    else:
        found._write()


def everything(index: Index) -> list[tuple[bytes, bytes]]:
    files = index.environment.database(b"files")
    return index.environment.read(
        lambda txn: [(bytes(k), bytes(v)) for k, v in txn.cursor(db=files)]
    )


def put(index: Index, name: bytes, value: bytes) -> None:
    files = index.environment.database(b"files")
    index.environment.write(lambda txn: txn.put(name, value, db=files))


class TestFileCacheGet:
    def test_the_file_cache_returns_the_node_of_an_unchanged_file(self, index: Index) -> None:
        assert file_cache(index).get(PATH, stat_of(node())) is None
        remembered(index)
        assert file_cache(index).get(PATH, stat_of(node())) == node()

    @pytest.mark.parametrize("what", ["inode", "size", "mtime_ns", "ctime_ns"])
    def test_the_file_cache_returns_nothing_for_a_changed_file(
        self, index: Index, what: str
    ) -> None:
        remembered(index)
        other = getattr(node(), what) + 1
        assert file_cache(index).get(PATH, stat_of(node(), **{what: other})) is None

    @pytest.mark.parametrize(
        "path", [b"home/me/another name", b"home/a very special name", PATH + b"/"]
    )
    def test_the_file_cache_returns_nothing_for_another_path(
        self, index: Index, path: bytes
    ) -> None:
        remembered(index)
        assert file_cache(index).get(path, stat_of(node())) is None

    def test_the_file_cache_returns_nothing_with_another_key(self, index: Index) -> None:
        remembered(index)
        assert file_cache(index, bytes(32)).get(PATH, stat_of(node())) is None

    @pytest.mark.parametrize(
        "untrusted",
        [
            node(state=CaptureState.CHANGED),
            node(state=CaptureState.APPENDED),
            node(racy=True),
            entry(b"a very special name", NodeType.SYMLINK, content=b"x", inode=7, size=30),
        ],
        ids=["changed", "appended", "racy", "link"],
    )
    def test_the_file_cache_stores_no_node_that_may_not_be_trusted(
        self, index: Index, untrusted: Node
    ) -> None:
        remembered(index, untrusted)
        assert everything(index) == []
        assert file_cache(index).get(PATH, stat_of(untrusted)) is None

    def test_entries_of_small_files_have_one_size(self, index: Index) -> None:
        other = node(content=EXTENT.pack(7, CHUNKS[0]), size=7, inode=8, mtime_ns=1)
        remembered(index, node())
        remembered(index, other)
        first, second = everything(index)
        assert len(first[1]) == len(second[1])
        assert file_cache(index).get(PATH, stat_of(other)) == other

    def test_entries_of_large_files_show_only_a_size_class(self, index: Index) -> None:
        sizes = set()
        for count in range(100, 110):
            large = node(content=CONTENT * count, size=30 * count, inode=count)
            remembered(index, large)
            assert file_cache(index).get(PATH, stat_of(large)) == large
            sizes = {len(value) for _, value in everything(index)}
        assert len(sizes) < 6

    def test_an_entry_that_an_earlier_version_did_not_pad_is_read(
        self, index: Index, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(file_cache_module, "_padded", lambda encoded: encoded)
            remembered(index)
        assert file_cache(index).get(PATH, stat_of(node())) == node()

    def test_the_file_cache_returns_nothing_for_a_damaged_record(self, index: Index) -> None:
        remembered(index)
        ((name, value),) = everything(index)
        for place in range(12, len(value)):
            changed = value[:place] + bytes([value[place] ^ 1]) + value[place + 1 :]
            put(index, name, changed)
            assert file_cache(index).get(PATH, stat_of(node())) is None
        for size in (0, 5, 12, 24, len(value) - 1):
            put(index, name, value[:size])
            assert file_cache(index).get(PATH, stat_of(node())) is None


class TestFileCacheTrust:
    def test_the_file_cache_trusts_an_unfinished_backup_whose_blobs_are_in_the_index(
        self, index: Index
    ) -> None:
        remembered(index, confirm=False)
        assert file_cache(index).get(PATH, stat_of(node())) == node()

    def test_the_file_cache_distrusts_an_unfinished_backup_whose_blobs_are_not_in_the_index(
        self, index: Index
    ) -> None:
        lost = node(content=CONTENT + EXTENT.pack(10, keyed_digest(b"x", DOMAIN.digest_key)))
        remembered(index, lost, confirm=False)
        assert file_cache(index).get(PATH, stat_of(lost)) is None

    def test_the_file_cache_distrusts_a_file_with_a_damaged_blob(self, index: Index) -> None:
        remembered(index)
        location = index.lookup(CHUNKS[0])
        assert location is not None
        index.mark_blobs(location.pack, [CHUNKS[0]])
        assert file_cache(index).get(PATH, stat_of(node())) is None

    def test_the_file_cache_distrusts_only_files_whose_pack_was_removed(self, index: Index) -> None:
        other = node(content=EXTENT.pack(10, CHUNKS[2]), inode=8)
        remembered(index, node(), other)
        location = index.lookup(CHUNKS[1])
        assert location is not None
        index.remove_packs({location.pack: index.pack_ref(location.pack)})
        assert file_cache(index).get(PATH, stat_of(node())) is None
        assert file_cache(index).get(PATH, stat_of(other)) == other

    def test_the_file_cache_distrusts_a_file_whose_pack_is_marked_for_removal(
        self, index: Index
    ) -> None:
        remembered(index)
        location = index.lookup(CHUNKS[1])
        assert location is not None
        index.mark_for_removal([location.pack])
        assert file_cache(index).get(PATH, stat_of(node())) is None

    def test_the_file_cache_distrusts_content_lists_in_packs_after_any_loss(
        self, index: Index
    ) -> None:
        deep = node(levels=1)
        remembered(index, deep)
        assert file_cache(index).get(PATH, stat_of(deep)) == deep
        location = index.lookup(CHUNKS[2])
        assert location is not None
        index.remove_packs({location.pack: index.pack_ref(location.pack)})
        assert file_cache(index).get(PATH, stat_of(deep)) is None

    def test_the_file_cache_distrusts_content_lists_of_an_unfinished_backup(
        self, index: Index
    ) -> None:
        deep = node(levels=1)
        remembered(index, deep, confirm=False)
        assert file_cache(index).get(PATH, stat_of(deep)) is None


class TestFileCacheAge:
    @pytest.fixture
    def day(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
        """The day that it is, which the test may change."""
        now = [20_000]

        class Clock:
            @staticmethod
            def time() -> float:
                return now[0] * DAY_S + 100.0

        monkeypatch.setattr(file_cache_module, "time", Clock)
        yield now

    def test_the_file_cache_drops_files_not_seen_for_two_months(
        self, index: Index, day: list[int]
    ) -> None:
        remembered(index)
        day[0] += 60
        file_cache(index).commit()
        assert len(everything(index)) == 1
        day[0] += 1
        file_cache(index).commit()
        assert everything(index) == []

    def test_the_file_cache_keeps_files_that_are_seen(self, index: Index, day: list[int]) -> None:
        remembered(index)
        for _ in range(20):
            day[0] += 8
            again = file_cache(index)
            assert again.get(PATH, stat_of(node())) == node()
            again.commit()
        assert len(everything(index)) == 1

    def test_the_file_cache_rewrites_no_record_every_day(
        self, index: Index, day: list[int]
    ) -> None:
        remembered(index)
        before = everything(index)
        day[0] += 6
        again = file_cache(index)
        assert again.get(PATH, stat_of(node())) == node()
        again.commit()
        assert everything(index) == before

    def test_the_file_cache_drops_old_files_among_many(
        self, index: Index, day: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(file_cache_module, "_SCAN_BATCH", 7)
        monkeypatch.setattr(file_cache_module, "_BATCH", 10)
        remembered(index, *(node(inode=n) for n in range(100, 140)))
        day[0] += 50
        remembered(index, *(node(inode=n) for n in range(200, 240)))
        assert len(everything(index)) == 80
        day[0] += 30
        file_cache(index).commit()
        assert len(everything(index)) == 40
        assert file_cache(index).get(PATH, stat_of(node(inode=239))) is not None


def test_the_file_cache_shows_nothing_of_a_file_to_readers_of_the_index(
    index: Index, tmp_path: Path
) -> None:
    special = node(content=CONTENT, uid=1_234_567_890)
    remembered(index, special)
    index.close()
    kept = b"".join(file.read_bytes() for file in (tmp_path / "index").iterdir())
    for secret in (
        PATH,
        b"very special name",
        CONTENT,
        DOMAIN.file_cache_key,
        DOMAIN.secret,
        special.mtime_ns.to_bytes(8, "little"),
        special.mtime_ns.to_bytes(8, "big"),
        (1_234_567_890).to_bytes(4, "big"),
    ):
        assert secret not in kept
    # What the index contains anyway, under keyed digests.
    assert bytes(CHUNKS[0]) in kept


def test_the_file_cache_stores_the_same_file_in_other_bytes_every_time(index: Index) -> None:
    remembered(index)
    first = everything(index)
    remembered(index)
    second = everything(index)
    assert [name for name, _ in first] == [name for name, _ in second]
    assert first[0][1][12:] != second[0][1][12:]
