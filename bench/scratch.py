"""The scratch folder of a run: checked for space before the run, and removed after it.

Everything that a run creates is below one new folder. So the same few lines find all mounts and servers and
remove every file after an error, Ctrl-C or a termination. A folder with a mount in it is never removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

from bench.machine import available_bytes, file_system_of
from bench.measure import server_pids

UNMOUNT_PATIENCE_S = 20.0
POLL_S = 0.01
MARGIN_BYTES = 1 << 30
MEMORY_ROOT = Path("/dev/shm")


class ScratchError(Exception):
    """The scratch folder cannot be used; the message says why."""


class Scratch:
    """A new folder below `root` for one run; leaving the context unmounts and removes it."""

    def __init__(self, root: Path) -> None:
        self._handlers: dict[signal.Signals, signal.Handlers | Callable[..., object] | int | None]
        self._handlers = {}
        try:
            root.mkdir(parents=True, exist_ok=True)
            self.root = root.resolve()
            self.folder = Path(tempfile.mkdtemp(prefix="run-", dir=self.root))
            self._memory: Path | None = None
        except OSError as error:
            raise ScratchError(f"The scratch folder {root} cannot be used: {error}.") from error

    def __enter__(self) -> Scratch:
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._handlers[number] = signal.signal(number, _interrupt)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._handlers[signal.SIGINT] = signal.getsignal(signal.SIGINT)
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)
        try:
            self.remove(self.folder)
            if self._memory is not None:
                self.remove(self._memory)
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def make(self, *names: str) -> Path:
        """Create an empty folder below the run's folder and return it."""
        path = self.folder.joinpath(*names)
        path.mkdir(parents=True)
        return path

    def memory_folder(self, file_bytes: int) -> Path | None:
        """Return a folder of this run in a tmpfs with room for so many bytes, None if there is none."""
        if not MEMORY_ROOT.is_dir() or file_system_of(MEMORY_ROOT) != "tmpfs":
            return None
        stats = os.statvfs(MEMORY_ROOT)
        # The pages of a tmpfs and the kernel's cache of what is read share the memory.
        free_bytes = min(stats.f_bavail * stats.f_frsize, available_bytes()) // 2
        if free_bytes < file_bytes + MARGIN_BYTES:
            return None
        if self._memory is None:
            self._memory = Path(tempfile.mkdtemp(prefix="casfs-bench-", dir=MEMORY_ROOT))
        return self._memory

    def remove(self, folder: Path) -> None:
        """Unmount all mounts below `folder` and remove it; do nothing if it does not exist.

        Raises ScratchError if a mount stays; then nothing was removed.
        """
        if not folder.exists():
            return
        for mountpoint in mounts_below(folder):
            unmount(mountpoint)
        left = mounts_below(folder)
        if left:
            raise ScratchError(f"{left[0]} could not be unmounted, so {folder} was left as it is.")
        # Found trees may hold folders that even their owner cannot write to.
        done = subprocess.run(["rm", "-rf", "--one-file-system", "--", folder], check=False)
        if done.returncode != 0:
            subprocess.run(["chmod", "-R", "u+rwX", "--", folder], check=False)
            shutil.rmtree(folder)

    def discard(self, folder: Path) -> None:
        """Move a folder to the trash until `purge`; it must contain no mount.

        For minutes after many files were removed, ext4 skips their inodes one by one when it creates
        files. To remove one program's output at once would slow the next program down.
        """
        trash = self.folder / "trash"
        trash.mkdir(exist_ok=True)
        if folder.exists():
            folder.rename(tempfile.mkdtemp(dir=trash))

    def purge(self) -> None:
        """Empty the trash; drop the kernel's cache afterwards."""
        self.remove(self.folder / "trash")

    def has_room(self, file_bytes: int, files: int) -> bool:
        """Return whether the scratch folder has space for so many more bytes and files."""
        try:
            self.need(file_bytes, files, "")
        except ScratchError:
            return False
        return True

    def need(self, file_bytes: int, files: int, purpose: str) -> None:
        """Raise ScratchError if the scratch folder has no space for so many more bytes and files."""
        stats = os.statvfs(self.folder)
        free_bytes = stats.f_bavail * stats.f_frsize
        wanted_bytes = file_bytes + MARGIN_BYTES
        if free_bytes < wanted_bytes:
            raise ScratchError(
                f"{purpose} needs about {wanted_bytes / 1e9:.0f} GB in {self.root}, where "
                f"{free_bytes / 1e9:.1f} GB are free. Make room, or choose another folder with "
                "--scratch."
            )
        if stats.f_files and stats.f_favail < files:
            raise ScratchError(
                f"{purpose} needs about {files:,} inodes in {self.root}, where "
                f"{stats.f_favail:,} are free. Choose another folder with --scratch."
            )


def mounts_below(folder: Path) -> list[Path]:
    """Return the mountpoints at or below `folder`, the deepest first."""
    prefix = os.fsencode(folder)
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        path = _unescape(line.split()[4])
        if path == prefix or path.startswith(prefix + b"/"):
            found.append(Path(os.fsdecode(path)))
    return sorted(found, key=lambda path: len(path.parts), reverse=True)


def unmount(mountpoint: Path) -> None:
    """Unmount and wait until the server has ended; kill it if it does not."""
    pids = server_pids(mountpoint)
    for command in (["fusermount3", "-u"], ["umount"], ["fusermount3", "-uz"], ["umount", "-l"]):
        if mountpoint not in mounts_below(mountpoint):
            break
        with contextlib.suppress(OSError):
            subprocess.run([*command, str(mountpoint)], capture_output=True, check=False)
    await_end(mountpoint, pids)


def await_end(mountpoint: Path, pids: tuple[int, ...]) -> None:
    """Wait until the server processes of a mountpoint are gone; end them if they stay.

    Only processes that still name the mountpoint are ended, never a successor of the same number.
    """
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + UNMOUNT_PATIENCE_S
        if number is not None:
            for pid in set(pids) & set(server_pids(mountpoint)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        while time.monotonic() < deadline:
            if not set(pids) & set(server_pids(mountpoint)):
                return
            time.sleep(POLL_S)


def _unescape(field: bytes) -> bytes:
    """Return the path of a mountinfo entry, in which space, tab, newline and backslash are octal."""
    head, *rest = field.split(b"\\")
    return head + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
