"""Sizes agree with what was stored, and shared blobs are counted apart from a snapshot's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casfs.digest import Digest, digest_of
from casfs.errors import BlobError
from casfs.format.codec import BlobKind
from casfs.format.tree import Node
from casfs.index.bitmap import Bitmap
from casfs.query.stats import pack_stats, repository_stats, snapshot_stats
from casfs.store.blob_store import pack_name
from casfs.trees.content import ContentWriter
from tests.support.builders import RepositoryFixture, entry, file, flagged, reference
from tests.support.stores import noise


@pytest.fixture
def repo(tmp_path: Path) -> RepositoryFixture:
    return RepositoryFixture(tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    (folder / "big").write_bytes(os.urandom(3 << 20))
    (folder / "sub" / "small").write_bytes(os.urandom(5000))
    (folder / "sub" / "twin").write_bytes((folder / "sub" / "small").read_bytes())
    (folder / "empty").touch()
    (folder / "link").symlink_to("big")
    return folder


def test_the_first_snapshot_needs_all_that_was_stored(
    repo: RepositoryFixture, source: Path
) -> None:
    snapshot_id, snapshot = repo.back_up(source)
    with repo.reading() as repository:
        whole = repository_stats(repository)
        seen = snapshot_stats(repository, "latest")
    assert snapshot.root.tree is not None
    assert (whole.snapshots, whole.packs) == (1, 2)
    assert whole.blobs == seen.blobs == snapshot.stats.new_blobs
    assert whole.plain_bytes == snapshot.stats.new_plain_bytes
    assert whole.total_bytes == seen.total_bytes == (3 << 20) + 2 * 5000
    assert seen.stored_bytes == snapshot.stats.new_stored_bytes
    assert seen.unique_stored_bytes == seen.stored_bytes < whole.pack_bytes
    assert (seen.snapshot_id, seen.entries) == (snapshot_id, snapshot.root.tree.nodes)
    assert seen.flagged == 0


def test_two_snapshots_of_the_same_have_nothing_of_their_own(repo: RepositoryFixture) -> None:
    content = os.urandom(10_000)
    repo.store(content)
    first, _ = repo.publish({b"f": file(b"", content)}, time_ns=1)
    second, _ = repo.publish({b"f": file(b"", content)}, time_ns=2)
    with repo.reading() as repository:
        assert repository_stats(repository).snapshots == 2
        for snapshot_id in (first, second):
            seen = snapshot_stats(repository, snapshot_id.hex())
            assert (seen.snapshot_id, seen.blobs) == (snapshot_id, 2)
            assert seen.stored_bytes > 10_000
            assert seen.unique_stored_bytes == 0


def test_what_a_change_added_is_the_snapshots_own(repo: RepositoryFixture, source: Path) -> None:
    repo.back_up(source)
    (source / "new").write_bytes(os.urandom(100_000))
    _, snapshot = repo.back_up(source)
    with repo.reading() as repository:
        seen = snapshot_stats(repository, "latest")
    assert 100_000 <= snapshot.stats.new_stored_bytes < 110_000
    assert seen.unique_stored_bytes == snapshot.stats.new_stored_bytes
    assert seen.stored_bytes > 3 << 20


def test_snapshot_stats_of_a_path_count_only_that_part(
    repo: RepositoryFixture, source: Path
) -> None:
    repo.back_up(source)
    with repo.reading() as repository:
        part = snapshot_stats(repository, f"latest:{source}/sub")
        one = snapshot_stats(repository, f"latest:{source}/big")
    assert (part.entries, part.total_bytes, part.blobs) == (2, 10_000, 2)
    assert 5000 < part.stored_bytes < 6000
    assert (one.entries, one.total_bytes) == (1, 3 << 20)
    assert one.stored_bytes >= 3 << 20


def test_flagged_files_are_counted_from_the_summary(repo: RepositoryFixture) -> None:
    repo.publish({b"a": flagged(file(b"")), b"b": {b"c": flagged(file(b"")), b"d": b""}})
    with repo.reading() as repository:
        assert snapshot_stats(repository, "latest").flagged == 2
        assert snapshot_stats(repository, "latest:a").flagged == 1
        assert snapshot_stats(repository, "latest:b/d").flagged == 0


def big_file(repo: RepositoryFixture, chunks: list[bytes]) -> Node:
    """Store a file of these chunks and return its node, whose list of chunks has lists below it."""
    with repo.writing() as repository:
        writer = repository.writer()
        content = ContentWriter(writer.put, digest_of)
        for chunk in chunks:
            writer.put(BlobKind.DATA, digest_of(chunk), chunk)
            content.add(len(chunk), digest_of(chunk))
        records, levels = content.finish()
        writer.finish()
    return entry(b"", size=sum(map(len, chunks)), content=records, levels=levels)


def test_every_chunk_of_a_file_with_lists_of_lists_is_counted_once(repo: RepositoryFixture) -> None:
    chunks = [noise(f"chunk {number}", 12) for number in range(20_000)]
    node = big_file(repo, chunks * 2)
    assert node.levels > 0
    other = big_file(repo, [*chunks, b"one more"])
    first, _ = repo.publish({b"big": node, b"again": node})
    repo.publish({b"other": other})
    with repo.reading() as repository:
        lists = set(repository.content(node).blobs()) - {digest_of(chunk) for chunk in chunks}
        store = repository.store
        stored = sum(store.locate(Digest(part)).stored_bytes + 16 for part in lists)
        stored += sum(len(chunk) + 16 for chunk in chunks)
        both = set(repository.content(other).blobs())
        seen = snapshot_stats(repository, f"{first.hex()}:again")
        assert seen.blobs == len(chunks) + len(lists)
        assert seen.stored_bytes == stored
        own = lists - both
        assert 0 < len(own) < len(lists)
        assert seen.unique_stored_bytes == sum(
            store.locate(Digest(part)).stored_bytes + 16 for part in own
        )


def test_a_file_that_consists_of_a_tree_hides_nothing_of_that_tree(repo: RepositoryFixture) -> None:
    inside = b"only in the directory" * 100
    repo.store(inside)
    _, snapshot = repo.publish({b"z": {b"file": file(b"", inside)}})
    with repo.reading() as repository:
        folder = repository.trees.resolve(snapshot.root, b"z")
        assert folder is not None
        as_file = file(b"", repository.store.read(reference(folder)))
    second, _ = repo.publish({b"a": as_file, b"z": folder})
    with repo.reading() as repository:
        assert snapshot_stats(repository, second.hex()).blobs == 3


def test_a_damaged_tree_is_an_error_and_no_wrong_number(repo: RepositoryFixture) -> None:
    _, snapshot = repo.publish({b"a": {b"b": b""}})
    repo.damage(reference(snapshot.root))
    with repo.reading() as repository, pytest.raises(BlobError):
        snapshot_stats(repository, "latest")


@given(st.lists(st.integers(0, 5000)), st.lists(st.integers(0, 6000)))
def test_a_bitmap_is_a_set_of_numbers(added: list[int], asked: list[int]) -> None:
    bitmap, oracle = Bitmap(), set[int]()
    for number in added:
        assert bitmap.add(number) is (number not in oracle)
        oracle.add(number)
    assert [number in bitmap for number in asked] == [number in oracle for number in asked]


def test_the_oldest_verification_is_the_time_of_the_pack_that_was_verified_longest_ago(
    repo: RepositoryFixture,
) -> None:
    for content in (b"first", b"second", b"third"):
        repo.store(os.urandom(1000) + content)
    with repo.reading() as repository:
        first, second, third = repository.store.index.packs()
        written_ns = {
            pack.ordinal: repository.store.storage.mtime_ns(pack_name(pack.pack))
            for pack in (first, second, third)
        }
        fresh = pack_stats(repository)
    assert (fresh.packs, fresh.unverified_packs) == (3, 3)
    assert fresh.pack_bytes == first.pack_bytes + second.pack_bytes + third.pack_bytes
    assert fresh.oldest_verification_ns == min(written_ns.values())
    later_s = max(written_ns.values()) // 1_000_000_000 + 100
    with repo.writing() as repository:
        repository.store.index.mark_verified([first.ordinal, second.ordinal], later_s)
    with repo.reading() as repository:
        checked = pack_stats(repository)
    assert checked.unverified_packs == 1
    assert checked.oldest_verification_ns == written_ns[third.ordinal]
    with repo.writing() as repository:
        repository.store.index.mark_verified([second.ordinal], later_s + 50)
        repository.store.index.mark_verified([third.ordinal], later_s + 60)
    with repo.reading() as repository:
        assert pack_stats(repository).oldest_verification_ns == later_s * 1_000_000_000


def test_a_repository_without_packs_has_no_oldest_verification(repo: RepositoryFixture) -> None:
    with repo.reading() as repository:
        seen = pack_stats(repository)
    assert (seen.packs, seen.pack_bytes, seen.oldest_verification_ns) == (0, 0, None)
