"""What the files of one user may cost a backup."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from casfs.backup import source_fs, source_reader
from casfs.backup.allowance import LEASE_WAIT_S, Allowances
from casfs.backup.run import BackupOptions, run_backup
from casfs.backup.source_reader import verify_read
from casfs.monitor import RecordingMonitor
from tests.support.builders import RepositoryFixture
from tests.support.other_user import OTHER_USER, needs_root

TERA = 1 << 40


@needs_root
def test_a_huge_sparse_file_of_another_user_is_left_out_and_the_rest_is_published(
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "small").write_bytes(b"data of somebody else")
    (source / "sparse").write_bytes(b"beginning")
    os.truncate(source / "sparse", 10 * TERA)
    os.chown(source / "sparse", OTHER_USER, OTHER_USER)
    repo = RepositoryFixture(tmp_path)
    monitor = RecordingMonitor()
    with repo.writing() as repository:
        result = run_backup(repository, BackupOptions(paths=(bytes(source),)), monitor)
        above = os.fsencode(str(source)).lstrip(b"/")
        assert repository.trees.resolve(result.snapshot.root, above + b"/small") is not None
        assert repository.trees.resolve(result.snapshot.root, above + b"/sparse") is None
    assert result.snapshot.stats.unreadable == 1
    (problem,) = monitor.problems
    assert problem.path.endswith(b"sparse") and "--max-holes" in problem.message


def test_the_holes_of_all_files_of_one_owner_count_together() -> None:
    allowances = Allowances(max_hole_bytes=100)
    allowances.take_hole(1000, 60)
    allowances.take_hole(1001, 60)
    with pytest.raises(OSError, match="user 1000"):
        allowances.take_hole(1000, 60)
    allowances.take_hole(1000, 40)


def test_the_user_ids_of_containers_share_one_allowance() -> None:
    allowances = Allowances(max_hole_bytes=100)
    allowances.take_hole(165_536, 60)
    with pytest.raises(OSError, match="sparse files"):
        allowances.take_hole(231_071, 60)


def test_root_and_the_own_user_have_no_limit_of_holes() -> None:
    allowances = Allowances(max_hole_bytes=100)
    allowances.take_hole(0, 10 * TERA)
    allowances.take_hole(os.geteuid(), 10 * TERA)


def test_a_second_read_counts_holes_too(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.write_bytes(b"x")
    os.truncate(path, 8 << 20)
    counted: list[int] = []
    with open(path, "rb") as file:
        verify_read(file.fileno(), 1, lambda uid, length: counted.append(length))
    assert 0 < sum(counted) < 8 << 20

    def refuse(uid: int, length: int) -> None:
        raise OSError(27, "refused")

    with open(path, "rb") as file, pytest.raises(OSError, match="refused"):
        verify_read(file.fileno(), 1, refuse)


def test_zeros_are_digested_in_steps_between_which_an_interrupt_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(source_reader, "update_zeros", lambda whole, length: steps.append(length))
    whole = source_reader._WholeDigest()
    whole.add_zeros(TERA + 1)
    whole.close()
    assert sum(steps) == TERA + 1
    assert max(steps) <= 256 << 20


def test_waiting_for_leases_ends_when_the_owner_has_used_up_the_allowance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leased").write_bytes(b"")
    waited: list[float] = []

    def refuse(*arguments: object, **options: object) -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    fd = os.open(tmp_path, os.O_RDONLY)
    sleep, here = time.sleep, threading.get_ident()

    def wait(pause_s: float) -> None:
        # Threads of earlier tests may sleep as well.
        if threading.get_ident() == here:
            waited.append(pause_s)
        else:
            sleep(pause_s)

    monkeypatch.setattr(time, "sleep", wait)
    allowances = Allowances()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        for _ in range(1000):
            with pytest.raises(BlockingIOError):
                source_fs.open_file(fd, b"leased", allowances.may_wait)
    os.close(fd)
    assert 0 < sum(waited) <= LEASE_WAIT_S
    assert not allowances.may_wait(os.geteuid(), LEASE_WAIT_S)
    assert allowances.may_wait(os.geteuid() + 1, LEASE_WAIT_S)
