"""An index that is not what casfs left is found out before LMDB dies of it."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from casfs.digest import PackId, digest_of
from casfs.errors import IndexDamagedError
from casfs.format.pack import PackEntry, PackRef
from casfs.index import fingerprint
from casfs.index.fingerprint import IndexState
from casfs.index.index import Index
from casfs.maintenance.repair import repair_index
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import open_for_maintenance, open_for_reading, open_for_writing
from casfs.repository.repository import Repository
from casfs.storage.locks import LockMode
from tests.support.builders import RepositoryFixture
from tests.support.stores import add_pack, make_pack, noise

PAGE = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sealed index with some pages."""
    folder = tmp_path / "index"
    index = Index(folder)
    entries = [
        PackEntry(digest_of(b"%d" % number), 32 + number, 1, 1, 1, 0) for number in range(3000)
    ]
    index.rebuild(lambda: [(PackRef(PackId(digest_of(b"pack")), False), 4000, entries)])
    index.close()
    fingerprint.write_fingerprint(folder)
    return folder


def _touch(file: Path, times: os.stat_result) -> None:
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def _change(path: Path, change: str, keep_time: bool) -> None:
    file = path / "data.mdb"
    before = file.stat()
    data = bytearray(file.read_bytes())
    pages = len(data) // PAGE
    if change == "cut":
        del data[len(data) // 2 :]
    elif change == "emptied":
        data.clear()
    elif change == "junk":
        data[:] = random.Random(1).randbytes(len(data))
    elif change == "zeros":
        # The last pages are those of the tree of blobs that was written last.
        data[2 * PAGE :] = bytes(len(data) - 2 * PAGE)
    else:
        data[(pages - 2) * PAGE + 40] ^= 4
    file.write_bytes(data)
    if keep_time:
        _touch(file, before)


def _lose_free_pages(path: Path) -> None:
    """Zero the page from which LMDB takes which pages are free (offsets of its format)."""
    file = path / "data.mdb"
    data = bytearray(file.read_bytes())
    metas = [data[number * PAGE + 16 : number * PAGE + 152] for number in (0, 1)]
    newest = max(metas, key=lambda meta: int.from_bytes(meta[128:], "little"))
    root = int.from_bytes(newest[64:72], "little")
    assert 1 < root < len(data) // PAGE
    data[root * PAGE : (root + 1) * PAGE] = bytes(PAGE)
    file.write_bytes(data)


@pytest.mark.parametrize("what", ["the fingerprint", "the damage mark"])
def test_writing_beside_an_index_follows_no_link_that_another_process_planted(
    path: Path, what: str
) -> None:
    victim = path.parent / "victim"
    victim.write_bytes(b"precious")
    for name in (f"seal.{os.getpid()}", "seal"):
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(victim)
    if what == "the fingerprint":
        fingerprint.write_fingerprint(path)
    else:
        fingerprint.mark_index_damaged(path)
    assert victim.read_bytes() == b"precious"
    assert not (path / "seal").is_symlink()
    is_intact = fingerprint.assess(path, in_use=False) == IndexState.INTACT
    assert is_intact == (what == "the fingerprint")


def test_a_fingerprint_that_cannot_be_renamed_leaves_no_file(path: Path) -> None:
    (path / "seal").unlink()
    (path / "seal").mkdir()
    before = set(os.listdir(path))
    fingerprint.mark_index_damaged(path)
    assert set(os.listdir(path)) == before


def test_an_index_with_a_matching_fingerprint_is_intact(path: Path) -> None:
    assert fingerprint.assess(path, in_use=False) == IndexState.INTACT
    assert fingerprint.assess(path, in_use=True) == IndexState.INTACT


def test_a_missing_index_is_intact(tmp_path: Path) -> None:
    assert fingerprint.assess(tmp_path, in_use=False) == IndexState.INTACT


@pytest.mark.parametrize("keep_time", [True, False])
@pytest.mark.parametrize("change", ["cut", "emptied", "junk", "zeros"])
def test_damage_of_the_index_is_found_whatever_the_time_of_its_file(
    path: Path, change: str, keep_time: bool
) -> None:
    _change(path, change, keep_time)
    assert fingerprint.assess(path, in_use=False) == IndexState.DAMAGED


def test_a_flipped_bit_that_left_the_time_unchanged_is_found(path: Path) -> None:
    _change(path, "flip", keep_time=True)
    for in_use in (False, True):
        assert fingerprint.assess(path, in_use) == IndexState.DAMAGED


@pytest.mark.parametrize(
    "recorded", [b"", b"casfs index seal 2: x y z", b"\xff" * 5000, b"casfs index seal 1: 1 2 -\n"]
)
def test_an_index_without_a_readable_fingerprint_is_foreign(path: Path, recorded: bytes) -> None:
    (path / fingerprint.FINGERPRINT_FILE).write_bytes(recorded)
    assert fingerprint.assess(path, in_use=False) == IndexState.FOREIGN


def test_an_index_whose_fingerprint_another_user_wrote_is_never_opened(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file fits its fingerprint, which an attacker can compute but not authenticate."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state of the attacker"))
    fingerprint.write_fingerprint(path)
    assert fingerprint.assess(path, in_use=False) == IndexState.INTACT
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state of the victim"))
    monkeypatch.setattr(fingerprint, "_survives_a_probe", _never)
    assert fingerprint.assess(path, in_use=False) == IndexState.FOREIGN


@pytest.mark.parametrize("field", [0, 1, 2, 3])
def test_a_fingerprint_with_one_changed_field_is_foreign(path: Path, field: int) -> None:
    file = path / fingerprint.FINGERPRINT_FILE
    fields = file.read_text().split()
    place = len(fields) - 4 + field
    fields[place] = fields[place][:-1] + ("0" if fields[place][-1] != "0" else "1")
    file.write_text(" ".join(fields) + "\n")
    assert fingerprint.assess(path, in_use=False) == IndexState.FOREIGN


def test_a_repository_with_a_foreign_index_is_opened_with_a_rebuilt_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    repo = RepositoryFixture(tmp_path)
    repo.publish({b"f": b"1"})
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another state"))
    with open_for_reading(repo.root) as repository:
        assert all(repository.store.read(digest) for digest, _ in repository.store.index.blobs())
    assert "was not written by this user on this machine; rebuilding it" in caplog.text


def test_a_user_without_a_home_opens_an_index_after_a_probe(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "no absolute path")
    assert fingerprint.assess(path, in_use=False) == IndexState.INTACT
    _change(path, "junk", keep_time=False)
    assert fingerprint.assess(path, in_use=False) == IndexState.DAMAGED


def test_a_required_probe_reads_the_index_and_keeps_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint.require_probe(path)
    probed = []

    def probe(folder: Path) -> bool:
        probed.append(folder)
        return True

    monkeypatch.setattr(fingerprint, "_survives_a_probe", probe)
    assert fingerprint.assess(path, in_use=False) == IndexState.INTACT
    assert probed == [path]
    assert fingerprint.assess(path, in_use=False) == IndexState.INTACT
    assert probed == [path]


def test_a_required_probe_makes_no_foreign_index_the_users_own(path: Path) -> None:
    (path / fingerprint.FINGERPRINT_FILE).unlink()
    fingerprint.require_probe(path)
    assert fingerprint.assess(path, in_use=False) == IndexState.FOREIGN


def test_the_secret_is_private_and_stays(path: Path) -> None:
    file = Path(os.environ["XDG_STATE_HOME"], "casfs", fingerprint.SECRET_FILE)
    before = file.read_bytes()
    assert file.stat().st_mode & 0o777 == 0o600
    fingerprint.write_fingerprint(path)
    assert file.read_bytes() == before


def test_an_index_that_a_killed_writer_left_is_intact(path: Path) -> None:
    index = Index(path)
    index.mark_complete(b"s" * 32, 1)
    index.close()
    assert fingerprint.assess(path, in_use=False) == IndexState.INTACT


def test_an_index_that_a_living_writer_is_changing_is_checked_by_length_only(path: Path) -> None:
    _change(path, "flip", keep_time=False)
    assert fingerprint.assess(path, in_use=True) == IndexState.INTACT
    os.truncate(path / "data.mdb", 100)
    assert fingerprint.assess(path, in_use=True) == IndexState.DAMAGED


def test_a_large_index_is_known_by_its_inode_and_change_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_HASHED_BYTES", PAGE)
    fingerprint.write_fingerprint(path)
    st = (path / "data.mdb").stat()
    assert f" {st.st_ino}-{st.st_ctime_ns} " in (path / fingerprint.FINGERPRINT_FILE).read_text()
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "_survives_a_probe", _never)
        assert fingerprint.assess(path, in_use=False) == IndexState.INTACT
    _change(path, "zeros", keep_time=True)
    assert fingerprint.assess(path, in_use=False) == IndexState.DAMAGED


def _never(path: Path) -> bool:
    raise AssertionError(f"{path} was opened")


def opened(root: Path, verb: str | None) -> Repository:
    return open_for_reading(root) if verb is None else open_for_writing(root, verb)


@pytest.mark.parametrize("change", ["cut", "junk", "zeros"])
@pytest.mark.parametrize("verb", [None, "backup"])
def test_a_repository_with_a_damaged_index_is_opened_with_a_new_one(
    tmp_path: Path, change: str, verb: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    repo = RepositoryFixture(tmp_path)
    repo.publish({b"f": b"1"})
    _change(repo.root / "index", change, keep_time=False)
    with opened(repo.root, verb) as repository:
        assert len(list(repository.snapshots.iterate())) == 1
        assert all(repository.store.read(digest) for digest, _ in repository.store.index.blobs())
        assert repository.store.index.blob_count() > 0
    assert "is damaged; rebuilding it from the packs" in caplog.text
    caplog.clear()
    with opened(repo.root, verb):
        assert caplog.text == ""


def test_damage_that_no_entry_shows_is_found(path: Path) -> None:
    _lose_free_pages(path)
    assert fingerprint.assess(path, in_use=False) == IndexState.DAMAGED


def _grown(tmp_path: Path) -> RepositoryFixture:
    """A repository with an index that was rebuilt, so that it has free pages."""
    repo = RepositoryFixture(tmp_path)
    for number in range(5):
        repo.publish({b"f": b"%d" % number})
    return repo


def _repair(repo: RepositoryFixture) -> int:
    with open_for_maintenance(repo.root, "repair index", mode=LockMode.EXCLUSIVE) as repository:
        return repair_index(repository, RecordingMonitor()).blobs


@pytest.mark.parametrize("is_read", [True, False], ids=["read", "not-read"])
def test_repair_index_repairs_an_index_that_cannot_be_changed(
    tmp_path: Path, is_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = _grown(tmp_path)
    with repo.reading() as repository:
        blobs = repository.store.index.blob_count()
    _lose_free_pages(repo.root / "index")
    if not is_read:
        monkeypatch.setattr(fingerprint, "_survives_a_probe", lambda path: True)
    assert _repair(repo) == blobs
    repo.publish({b"f": b"another"})


def test_an_index_is_rebuilt_after_a_command_that_could_not_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = _grown(tmp_path)
    monkeypatch.setattr(fingerprint, "_survives_a_probe", lambda path: True)
    _lose_free_pages(repo.root / "index")
    with pytest.raises(IndexDamagedError):
        repo.publish({b"f": b"another"})
    snapshot_id, _ = repo.publish({b"f": b"another"})
    with repo.reading() as repository:
        assert snapshot_id in [found for found, _ in repository.snapshots.iterate()]
        assert len(list(repository.snapshots.iterate())) == 6


def test_an_index_that_cannot_be_brought_up_to_date_is_rebuilt_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = _grown(tmp_path)
    add_pack(repo.root, make_pack([noise("behind its back", 100)])[0])
    monkeypatch.setattr(fingerprint, "_survives_a_probe", lambda path: True)
    _lose_free_pages(repo.root / "index")
    repo.publish({b"f": b"another"})


def test_an_index_of_another_repository_does_no_harm(tmp_path: Path) -> None:
    repo, other = RepositoryFixture(tmp_path / "a"), RepositoryFixture(tmp_path / "b")
    repo.publish({b"f": b"1"})
    other.publish({b"g": b"2"})
    shutil.rmtree(repo.root / "index")
    shutil.copytree(other.root / "index", repo.root / "index")
    with open_for_reading(repo.root) as repository:
        ((_, snapshot),) = repository.snapshots.iterate()
        assert snapshot.root.tree is not None
        (node,) = repository.trees.nodes(snapshot.root.tree)
        assert node.name == b"f"
