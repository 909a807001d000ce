"""Rules for every test.

- A test marked `fuse` is skipped, with the reason, where FUSE cannot work; it fails there under
  CASFS_REQUIRE_FUSE=1.
- An ERROR record of a logger of casfs or mount fails the test that made it, unless the test
  is marked `expect_errors`, or `expect_errors("casfs.store")` for that logger and those below it.
- A mount that is still there below pytest's folder when all tests have ended is taken away, and
  fails the run.
- Hypothesis runs the profile that CASFS_HYPOTHESIS names: `ci` (bounded, the same examples every
  time) by default, or `long`.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.support.servers import S3Server, SshServer

LOGGERS = ("casfs", "casfs_mount")

hypothesis.settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=50,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "long",
    deadline=None,
    max_examples=2000,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile(os.environ.get("CASFS_HYPOTHESIS", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    # A repository of the person who runs the tests is never the one that they work on.
    for variable in (
        "REPOSITORY",
        "IDENTITY",
        "PASSPHRASE_FILE",
        "PASSPHRASE_COMMAND",
        "ALLOW_FOREIGN",
    ):
        os.environ.pop(f"CASFS_{variable}", None)


@pytest.fixture(autouse=True, scope="session")
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what a machine remembers of repositories out of the home of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """SeaweedFS with a bucket `casfs`; one for the process that runs the tests."""
    from tests.support.servers import seaweedfs

    with seaweedfs() as server:
        server.make_bucket("casfs")
        yield server


@pytest.fixture(scope="session")
def ssh_server() -> Iterator[SshServer]:
    """An SSH server of this user; one for the process that runs the tests."""
    from tests.support.servers import sshd

    with sshd() as server:
        yield server


def fuse_problem(device: str = "/dev/fuse", program: str = "fusermount3") -> str | None:
    """Return why FUSE cannot work on this machine, or None where it can."""
    if shutil.which(program) is None:
        return f"{program} is not installed"
    try:
        os.close(os.open(device, os.O_RDWR))
    except OSError as error:
        return f"{device} cannot be opened: {os.strerror(error.errno or errno.EIO)}"
    return None


class _Errors(logging.Handler):
    """Keeps the ERROR records that the test did not expect."""

    def __init__(self, item: pytest.Item) -> None:
        super().__init__(logging.ERROR)
        markers = list(item.iter_markers("expect_errors"))
        self.expects_any = any(not marker.args for marker in markers)
        self.expected = tuple(name for marker in markers for name in marker.args)
        self.unexpected: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        inside = any(
            record.name == name or record.name.startswith(f"{name}.") for name in self.expected
        )
        if not (self.expects_any or inside):
            self.unexpected.append(self.format(record))


@contextmanager
def _failing_on_errors(item: pytest.Item) -> Iterator[None]:
    handler = _Errors(item)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)
    # Not reached when the test failed by itself: that says more.
    if handler.unexpected:
        pytest.fail(
            "unexpected errors in the log:\n" + "\n".join(handler.unexpected), pytrace=False
        )


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own: what this machine remembers of repositories, its caches, its keys."""
    home = tmp_path / "own home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("GNUPGHOME", str(home / "gnupg"))
    return home


@pytest.hookimpl(specname="pytest_runtest_setup", tryfirst=True)
def pytest_refuse_without_fuse(item: pytest.Item) -> None:
    if item.get_closest_marker("fuse") is None or (problem := fuse_problem()) is None:
        return
    if os.environ.get("CASFS_REQUIRE_FUSE") == "1":
        pytest.fail(f"CASFS_REQUIRE_FUSE=1, and {problem}", pytrace=False)
    pytest.skip(f"no FUSE here: {problem}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    with _failing_on_errors(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    with _failing_on_errors(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    with _failing_on_errors(item):
        return (yield)


def mounts_below(folder: Path, table: str | None = None) -> list[tuple[bytes, str]]:
    """List mount points below a folder with the kind of file system, the innermost first.

    Nothing is asked of the mounts themselves: one whose daemon died answers no more.
    """
    found = []
    for line in (
        table or Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
    ).splitlines():
        before, _, after = line.partition(" - ")
        escaped = os.fsencode(before.split(" ")[4])
        point = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), escaped)
        if point.startswith(os.fsencode(folder) + b"/"):
            found.append((point, after.split(" ")[0]))
    return found[::-1]


def _take_away(point: bytes, kind: str) -> None:
    as_user = kind.startswith("fuse") and os.geteuid() != 0
    command = ["fusermount3", "-uz", "--"] if as_user else ["umount", "--lazy", "--"]
    subprocess.run([*command, point], check=False)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return  # the process that started the workers looks after all of them
    folder: Path = session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    left = mounts_below(folder.resolve())
    for point, kind in left:
        _take_away(point, kind)
    if left:
        session.config.stash[LEFT_MOUNTS] = [
            f"{os.fsdecode(point)!a} ({kind})" for point, kind in left
        ]
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


LEFT_MOUNTS = pytest.StashKey[list[str]]()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    left = config.stash.get(LEFT_MOUNTS, [])
    if left:
        terminalreporter.section("mounts that tests left behind", red=True)
        for line in left:
            terminalreporter.line(line)
