"""The record that this machine keeps of each profile, and the lock that allows one run of it at a time.

The record contains when each step last succeeded, which decides what is due, and the numbers of the last
backup and check, so that metrics stay meaningful after a run that failed. It is in the user's state
folder. Without it every step is due, and nothing else is lost.

The lock is `flock` on a file beside it. The processes of the steps inherit it: a run that is killed leaves
its lock with the step that is still running, and the kernel releases it when the last of them ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from pathlib import Path

import msgspec

from casfs.atomic_file import replace_file
from casfs.errors import LockedError, StorageError
from casfs.json_document import InvalidJsonError, parse_json
from casfs.user_dirs import make_private_folder, require_private_folder, user_folder

log = logging.getLogger(__name__)

_MAX_STATE_BYTES = 1024 * 1024


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A step when it last ran, and when it last succeeded (both when it began; None: never)."""

    last_run_s: float
    last_success_s: float | None = None
    exit: int = 0
    seconds: float = 0.0


class BackupNumbers(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of the last backup that published a snapshot."""

    time_s: float
    snapshot: str
    files: int
    bytes: int
    added_bytes: int
    flagged: int
    unreadable: int
    vanished: int


class RepositoryNumbers(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of the repository after the last run that could read them.

    `oldest_verification_s` is the earliest time at which a pack was last verified, or written if it was
    never verified; None without packs.
    """

    time_s: float
    packs: int
    bytes: int
    unverified_packs: int
    oldest_verification_s: float | None = None


class ProfileState(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a profile; `damage` is the number of findings of the last check."""

    profile: str
    last_start_s: float | None = None
    last_end_s: float | None = None
    last_success_s: float | None = None
    last_exit: int | None = None
    last_seconds: float = 0.0
    failures_in_a_row: int = 0
    damage: int | None = None
    steps: dict[str, StepRecord] = {}
    backup: BackupNumbers | None = None
    repository: RepositoryNumbers | None = None


class ProfileFiles:
    """The files of one profile of one configuration file in the state folder."""

    def __init__(self, profile: str, configuration: Path) -> None:
        # Profiles of the same name in two files are two profiles.
        place = hashlib.sha256(os.fsencode(configuration.resolve())).hexdigest()[:12]
        self._profile = profile
        self._folder = user_folder("XDG_STATE_HOME", ".local/state") / "profiles"
        self._state = self._folder / f"{profile}-{place}.json"
        self._lock = self._folder / f"{profile}-{place}.lock"

    def load(self) -> ProfileState:
        """Return the record; an empty one if there is none or it is damaged.

        Raise RefusedError where another user can change the folder.
        """
        require_private_folder(self._folder, "XDG_STATE_HOME")
        try:
            with open(self._state, "rb") as file:
                return parse_json(file.read(_MAX_STATE_BYTES), ProfileState)
        except FileNotFoundError:
            pass
        except (OSError, InvalidJsonError) as error:
            log.warning("the record of earlier runs in %s is ignored: %s", self._state, error)
        return ProfileState(profile=self._profile)

    def save(self, state: ProfileState) -> None:
        """Replace the record durably; raises StorageError."""
        try:
            self._make_folder()
            text = msgspec.json.format(msgspec.json.encode(state)) + b"\n"
            replace_file(self._state, text, durable=True)
        except OSError as error:
            raise StorageError("write the record of runs", str(self._state), error) from error

    def lock(self) -> ProfileLock:
        """Acquire the lock of the profile; raises LockedError if a run holds it, and StorageError."""
        try:
            self._make_folder()
            fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StorageError("open the lock of the profile", str(self._lock), error) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()} {time.time():.0f}\n".encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(fd, 64, 0).decode("ascii", "replace").split()
            os.close(fd)
            process = f" in process {holder[0]}" if holder else ""
            raise LockedError(
                f"profile {self._profile} is running already{process}; wait for it to end"
            ) from error
        except OSError as error:
            os.close(fd)
            raise StorageError("take the lock of the profile", str(self._lock), error) from error
        return ProfileLock(fd)

    def _make_folder(self) -> None:
        make_private_folder(self._folder, "XDG_STATE_HOME")


class ProfileLock:
    """A held lock; the processes of the steps inherit `fd`. The end of the `with` block releases it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> ProfileLock:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)
