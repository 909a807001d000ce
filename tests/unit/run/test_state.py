"""The record of a profile and its lock."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from casfs.errors import LockedError, RefusedError, StorageError
from casfs.run.state import BackupNumbers, ProfileFiles, ProfileState, StepRecord

STATE = ProfileState(
    profile="home",
    last_start_s=1.5,
    last_exit=4,
    steps={"mirror cloud": StepRecord(last_run_s=1.0, last_success_s=1.0, seconds=2.0)},
    backup=BackupNumbers(
        time_s=1.0,
        snapshot="ab",
        files=1,
        bytes=2,
        added_bytes=3,
        flagged=4,
        unreadable=5,
        vanished=6,
    ),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "casfs" / "profiles"


@pytest.fixture
def files(folder: Path) -> ProfileFiles:
    return ProfileFiles("home", Path("/etc/casfs/config.toml"))


def test_a_record_is_read_as_it_was_written(files: ProfileFiles, folder: Path) -> None:
    assert files.load() == ProfileState(profile="home")
    files.save(STATE)
    assert files.load() == STATE
    (path,) = folder.glob("home-*.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("content", [b"", b"{", b'{"profile": 1}', b"\xff", b"[]"])
def test_a_damaged_record_counts_as_none(
    files: ProfileFiles, folder: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    files.save(STATE)
    (path,) = folder.glob("home-*.json")
    path.write_bytes(content)
    assert files.load() == ProfileState(profile="home")
    assert "is ignored" in caplog.text


def test_a_record_is_not_written_through_a_file_that_another_process_planted(
    files: ProfileFiles, folder: Path
) -> None:
    files.save(STATE)
    (path,) = folder.glob("home-*.json")
    victim = folder / "victim"
    victim.write_bytes(b"precious")
    os.link(victim, path.with_suffix(".tmp"))
    files.save(STATE)
    assert victim.read_bytes() == b"precious"


def test_records_in_a_folder_that_others_can_write_are_refused(
    files: ProfileFiles, folder: Path
) -> None:
    files.save(STATE)
    folder.chmod(0o777)
    for use in (files.load, lambda: files.save(STATE), files.lock):
        with pytest.raises(RefusedError, match="XDG_STATE_HOME"):
            use()


def test_profiles_of_one_name_in_two_files_are_remembered_apart(files: ProfileFiles) -> None:
    files.save(STATE)
    other = ProfileFiles("home", Path("/home/anna/config.toml"))
    assert other.load() == ProfileState(profile="home")
    with files.lock(), other.lock():
        pass


def test_a_record_that_cannot_be_written_raises_a_storage_error(
    files: ProfileFiles, folder: Path
) -> None:
    folder.parent.mkdir()
    folder.touch()
    with pytest.raises(StorageError, match="record of runs"):
        files.save(STATE)
    with pytest.raises(StorageError, match="lock of the profile"):
        files.lock()


def test_a_second_lock_names_the_process_that_holds_the_first(files: ProfileFiles) -> None:
    with (
        files.lock(),
        pytest.raises(LockedError, match=f"running already in process {os.getpid()};"),
    ):
        files.lock()
    with files.lock():
        pass


def test_the_lock_lasts_as_long_as_a_process_that_inherited_it(files: ProfileFiles) -> None:
    with files.lock() as lock:
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fd]
        )
    try:
        with pytest.raises(LockedError):
            files.lock()
    finally:
        child.communicate(b"\n", timeout=60)
    with files.lock():
        pass


def test_a_lock_that_is_a_symbolic_link_is_refused(files: ProfileFiles, folder: Path) -> None:
    with files.lock():
        pass
    (path,) = folder.glob("home-*.lock")
    victim = folder / "victim"
    victim.write_text("precious")
    path.unlink()
    path.symlink_to(victim)
    with pytest.raises(StorageError):
        files.lock()
    assert victim.read_text() == "precious"
