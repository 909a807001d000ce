"""A process in the background: what its parent learns, and what it keeps of its parent."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from casfs_mount import daemon
from casfs_mount.daemon import LOGGERS, captured_stderr, log_to
from casfs_mount.damage_log import DamageLog
from casfs_mount.logged_name import NamelessFormatter

from casfs.errors import CasfsError, IntegrityError

SCRIPT = """
import os, sys, time, logging
from pathlib import Path
from casfs.errors import CasfsError, UsageError, LockedError, IntegrityError
from casfs_mount.daemon import run_in_background
folder = Path(sys.argv[1])
log = logging.getLogger("casfs_mount.test")
logging.getLogger("casfs_mount").addHandler(logging.StreamHandler())

def work(background):
    (folder / "pid").write_text(str(os.getpid()))
{work}

try:
    run_in_background(work, folder / "log")
except CasfsError as error:
    print(type(error).__name__, error.exit_code, error, flush=True)
else:
    print("ready", flush=True)
"""


def run(folder: Path, work: str) -> subprocess.CompletedProcess[str]:
    indented = "\n".join(f"    {line}" for line in work.splitlines())
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(work=indented), str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(folder: Path) -> bool:
    return Path(f"/proc/{(folder / 'pid').read_text()}/cmdline").exists()


def test_the_parent_process_ends_when_the_daemon_is_ready(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "background.ready()\n"
        "wait = folder / 'end'\n"
        "while not wait.exists(): time.sleep(0.01)\n"
        "state = [os.readlink(f'/proc/self/fd/{n}') for n in (0, 1, 2)] + [str(os.getsid(0))]\n"
        "log.warning('a warning for the log')\n"
        "(folder / 'state').write_text(' '.join(state))",
    )
    assert (done.stdout, done.stderr, done.returncode) == ("ready\n", "", 0)
    assert is_alive(tmp_path)
    assert not (tmp_path / "state").exists()
    (tmp_path / "end").touch()
    wait_for(lambda: not is_alive(tmp_path))
    assert (tmp_path / "state").read_text().split() == [
        *["/dev/null"] * 3,
        (tmp_path / "pid").read_text(),
    ]
    assert "WARNING a warning for the log" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("raised", "reported"),
    [
        ("CasfsError('it is not there')", "CasfsError 1 it is not there"),
        ("UsageError('you cannot mean that')", "UsageError 2 you cannot mean that"),
        ("IntegrityError('broken')", "IntegrityError 5 broken"),
        ("LockedError('taken')", "LockedError 6 taken"),
    ],
)
def test_an_error_before_the_daemon_is_ready_reaches_the_parent(
    tmp_path: Path, raised: str, reported: str
) -> None:
    done = run(tmp_path, f"raise {raised}")
    assert (done.stdout, done.stderr) == (f"{reported}\n", "")
    assert not is_alive(tmp_path)


def test_a_bug_before_the_daemon_is_ready_is_printed_with_its_traceback(tmp_path: Path) -> None:
    done = run(tmp_path, "raise ZeroDivisionError('a bug')")
    assert done.stdout.startswith("CasfsError 1 the mount's server ended: ZeroDivisionError")
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("work", "how"), [("os.kill(os.getpid(), 9)", "signal 9"), ("os._exit(7)", "exit code 7")]
)
def test_a_sudden_death_before_the_daemon_is_ready_is_reported(
    tmp_path: Path, work: str, how: str
) -> None:
    done = run(tmp_path, work)
    assert done.stdout == f"CasfsError 1 the mount's server ended unexpectedly ({how})\n"


def test_an_error_after_the_daemon_is_ready_is_logged(tmp_path: Path) -> None:
    done = run(tmp_path, "background.ready()\nraise ValueError('too late for the parent')")
    assert done.stdout == "ready\n"
    wait_for(lambda: not is_alive(tmp_path))
    assert "too late for the parent" in (tmp_path / "log").read_text()


def test_a_log_that_cannot_be_written_is_an_error_of_the_parent(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    done = run(tmp_path, "background.ready()")
    assert done.stdout.startswith("CasfsError 1 cannot write the log")


def test_interrupting_the_parent_ends_the_work(tmp_path: Path) -> None:
    script = SCRIPT.format(work="    time.sleep(600)")
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    parent.send_signal(2)
    parent.communicate(timeout=30)
    wait_for(lambda: not is_alive(tmp_path))


@pytest.fixture
def loggers_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kept = {name: (logging.getLogger(name).handlers[:], logging.root.level) for name in LOGGERS}
    level = {name: logging.getLogger(name).level for name in LOGGERS}
    raising = logging.raiseExceptions
    # What pytest captures has to be text that its processes can send each other.
    monkeypatch.setattr(logging.getLogger("casfs_mount"), "propagate", False)
    yield
    for name, (handlers, _) in kept.items():
        for handler in logging.getLogger(name).handlers:
            if handler not in handlers:
                handler.close()
        logging.getLogger(name).handlers[:] = handlers
        logging.getLogger(name).setLevel(level[name])
    logging.raiseExceptions = raising


def test_the_log_is_a_file_of_state_where_the_system_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loggers_kept: None
) -> None:
    monkeypatch.setattr(daemon, "_SYSLOG", str(tmp_path / "no-such-socket"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    log_to(None)
    logging.getLogger("casfs_mount.anything").warning("a name \udcff that is not text")
    text = (tmp_path / "state" / "casfs" / "mount.log").read_text()
    assert "WARNING a name \\udcff that is not text" in text


def test_a_log_file_is_readable_by_its_owner_only(tmp_path: Path, loggers_kept: None) -> None:
    before = os.umask(0)
    try:
        log_to(tmp_path / "mount.log")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "mount.log").stat().st_mode) == 0o600


def test_a_log_file_that_was_asked_for_has_to_be_writable(
    tmp_path: Path, loggers_kept: None
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CasfsError, match="cannot write the log"):
        log_to(tmp_path / "file" / "below")


def test_standard_error_of_libraries_is_captured(
    capfd: pytest.CaptureFixture[str],
) -> None:
    printed: list[str] = []
    with captured_stderr(printed):
        os.write(2, b"fuse: something\n\n  is wrong \xff\n")
    os.write(2, b"afterwards\n")
    assert printed == ["fuse: something", "is wrong \\xff"]
    assert capfd.readouterr().err == "afterwards\n"


def test_a_log_that_cannot_be_written_is_refused_before_the_process_forks(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    def work(pipe: object) -> None:
        raise AssertionError("the mount began")

    with pytest.raises(CasfsError, match="--log-file"):
        daemon.run_in_background(work, tmp_path / "file" / "log")


def test_without_syslog_and_state_folder_nothing_is_logged_and_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loggers_kept: None
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(daemon, "_SYSLOG", str(tmp_path / "no-such-socket"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    log_to(None)
    logging.getLogger("casfs_mount.anything").warning("lost")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.expect_errors("casfs_mount.damage_log")
def test_the_system_log_gets_no_names_of_files(caplog: pytest.LogCaptureFixture) -> None:
    damage = DamageLog()
    with caplog.at_level(logging.ERROR):
        damage.add_range(b"home/letter to anna", 0, 4096, IntegrityError("digest mismatch"))
    (record,) = caplog.records
    assert record.getMessage() == "home/letter to anna: bytes 0 to 4095: digest mismatch"
    shown = NamelessFormatter("%(levelname)s %(message)s").format(record)
    assert shown == "ERROR a file: bytes 0 to 4095: digest mismatch"
    assert b"letter" in damage.text()
