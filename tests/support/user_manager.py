"""A user's systemd manager of the test's own, in a mount namespace where systemd seems to have booted.

Nothing of the machine's systemd is touched: `/run` is an empty tmpfs inside, and the manager's units lie
in a home of its own.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SYSTEMD = Path("/lib/systemd/systemd")

_START = """
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/systemd/system
mkdir -m 700 /run/user
exec "$0" --user
"""


def missing_for_a_manager() -> str | None:
    """Return why no manager can be started here, or None."""
    if os.geteuid() != 0:
        return "needs root: it makes a mount namespace"
    if not SYSTEMD.exists() or not all(map(shutil.which, ("systemctl", "unshare", "nsenter"))):
        return "needs systemd, unshare and nsenter"
    done = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    if done.returncode:
        return "needs to make a mount namespace"
    return None


@dataclass(frozen=True, slots=True)
class UserManager:
    """A manager that runs; `prefix` starts a command beside it, with `environment`."""

    pid: int
    home: Path

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("nsenter", f"--target={self.pid}", "--mount", "env", *self.variables)

    @property
    def variables(self) -> tuple[str, ...]:
        return (f"HOME={self.home}", "XDG_RUNTIME_DIR=/run/user")

    def systemctl(self, *words: str) -> str:
        done = subprocess.run(
            [*self.prefix, "systemctl", "--user", *words],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip()


@contextmanager
def running_user_manager(home: Path, limit_s: float = 60.0) -> Iterator[UserManager]:
    """Run a manager until the block ends; its services end with it.

    Wait for the manager of another test first: the services of both would be in one control group.
    """
    with (Path(tempfile.gettempdir()) / "casfs-test-user-manager").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with _running_alone(home, limit_s) as manager:
            yield manager


@contextmanager
def _running_alone(home: Path, limit_s: float) -> Iterator[UserManager]:
    environment = {**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": "/run/user"}
    for name in list(environment):
        if name.startswith(("CASFS_", "XDG_C", "XDG_S", "DBUS_", "INVOCATION_ID", "NOTIFY_")):
            del environment[name]
    process = subprocess.Popen(
        ["unshare", "--mount", "/bin/sh", "-c", _START, str(SYSTEMD)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    manager = UserManager(process.pid, home)
    try:
        end = time.monotonic() + limit_s
        while manager.systemctl("is-system-running") not in ("running", "degraded"):
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                _, err = process.communicate()
                raise AssertionError(f"systemd --user does not run: {err.decode()}")
            time.sleep(0.05)
        yield manager
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
