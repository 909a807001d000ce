"""A machine without an identity keeps no exact sizes of what it stored; it is read all the same."""

from __future__ import annotations

import os
import struct
from contextlib import closing
from pathlib import Path

import pytest

from casfs.backup.run import BackupOptions, run_backup
from casfs.index.index import DATA_FILE, Index
from casfs.monitor import RecordingMonitor
from casfs.user_dirs import cached_index_dir
from tests.support.encryption import EncryptedRepositoryFixture
from tests.support.stores import flip, noise, pack_paths

LARGE_BYTES = 1_234_577
SMALL_BYTES = 34_579


@pytest.fixture
def repo(tmp_path: Path, own_home: Path) -> EncryptedRepositoryFixture:
    return EncryptedRepositoryFixture(tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "large").write_bytes(noise("large", LARGE_BYTES))
    (folder / "small").write_bytes(noise("small", SMALL_BYTES))
    (folder / "text").write_bytes(b"some text " * 500)
    return folder


def index_of(repo: EncryptedRepositoryFixture) -> Index:
    return Index(cached_index_dir(repo.config.id), readonly=True)


def content(repo: EncryptedRepositoryFixture, source: Path, name: str) -> bytes:
    """Read a file of the last snapshot with an identity."""
    with repo.reading() as repository:
        _, snapshot = repository.snapshots.resolve("latest")
        node = repository.trees.resolve(snapshot.root, os.fsencode(source / name).lstrip(b"/"))
        assert node is not None
        return b"".join(repository.store.read(one) for one in repository.content(node).blobs())


def test_the_index_of_a_machine_without_an_identity_shows_no_size_of_a_file(
    repo: EncryptedRepositoryFixture, source: Path
) -> None:
    repo.back_up(source)
    with closing(index_of(repo)) as index:
        found = [at for _, at in index.blobs()]
        assert len(found) > 3
        for at in found:
            assert (at.offset, at.stored_bytes, at.plain_bytes, at.position) == (0, 0, 0, 0)
    assert struct.pack("<I", SMALL_BYTES) not in (index.path / DATA_FILE).read_bytes()


def test_what_a_machine_without_an_identity_stored_is_not_stored_again(
    repo: EncryptedRepositoryFixture, source: Path
) -> None:
    repo.back_up(source)
    (source / "new").write_bytes(noise("new", 1000))
    again = repo.back_up(source, use_parent=False)
    # The new file, and the trees that lead to it.
    assert again.snapshot.stats.new_plain_bytes < 1000 + 4096


def test_a_process_with_an_identity_records_the_places_and_reads_every_file(
    repo: EncryptedRepositoryFixture, source: Path
) -> None:
    repo.back_up(source)
    for path in source.iterdir():
        assert content(repo, source, path.name) == path.read_bytes()
    with closing(index_of(repo)) as index:
        assert not index.unplaced_packs()
        assert all(at.has_place for _, at in index.blobs())


def test_places_that_are_known_stay_and_new_ones_are_omitted_again(
    repo: EncryptedRepositoryFixture, source: Path
) -> None:
    repo.back_up(source)
    assert content(repo, source, "small")
    with closing(index_of(repo)) as index:
        known = {digest for digest, at in index.blobs() if at.has_place}
    (source / "new").write_bytes(noise("new", 1000))
    repo.back_up(source)
    with closing(index_of(repo)) as index:
        assert {digest for digest, at in index.blobs() if at.has_place} == known
        assert len(index.unplaced_packs()) > 0
    assert content(repo, source, "new") == noise("new", 1000)


def test_the_sizes_that_an_earlier_version_recorded_are_dropped_by_the_next_backup(
    repo: EncryptedRepositoryFixture, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        for name in ("omit_places", "drop_old_places"):
            patch.setattr(Index, name, lambda self: None)
        repo.back_up(source)
    with closing(index_of(repo)) as index:
        assert all(at.has_place for _, at in index.blobs())
    with repo.writing("backup"):
        pass
    with closing(index_of(repo)) as index:
        assert not any(at.has_place for _, at in index.blobs())
        assert len(index.unplaced_packs()) == len(index.packs())
    assert content(repo, source, "large") == noise("large", LARGE_BYTES)


def test_a_process_without_an_identity_reads_the_trees_that_it_has_just_stored(
    repo: EncryptedRepositoryFixture, source: Path
) -> None:
    # As the final retry of changed files does.
    with repo.writing("backup") as repository:
        options = BackupOptions((os.fsencode(source),), host="here")
        root = run_backup(repository, options, RecordingMonitor()).snapshot.root
        node = repository.trees.resolve(root, os.fsencode(source / "small").lstrip(b"/"))
        assert node is not None and node.size == SMALL_BYTES
        assert not any(at.has_place for _, at in repository.store.index.blobs())


def test_a_damaged_directory_costs_only_what_a_scan_does_not_find(
    repo: EncryptedRepositoryFixture, source: Path
) -> None:
    repo.back_up(source)
    for path in pack_paths(repo.root):
        flip(path, -100)
    assert content(repo, source, "large") == noise("large", LARGE_BYTES)


def test_places_that_cannot_be_recorded_are_looked_up_for_each_read(
    repo: EncryptedRepositoryFixture, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.back_up(source)
    # As on a read-only disk, also for root.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for path in source.iterdir():
        assert content(repo, source, path.name) == path.read_bytes()
    with closing(index_of(repo)) as index:
        assert len(index.unplaced_packs()) == len(index.packs())
