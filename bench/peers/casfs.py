"""How casfs is called: as installed, with its defaults (zstd level 3)."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from bench.measure import Command

NAME = "casfs"


class Casfs:
    """The project's own command."""

    name = NAME
    label = "casfs"
    first_backup_only = False
    mount_stays = False

    def __init__(self, program: str) -> None:
        self._program = program

    def initialise(self, home: Path) -> Command:
        """Make the repository."""
        return self._command(home, "init")

    def backup(self, home: Path, source: Path, label: str) -> Command:
        """Back up `source` under its absolute path."""
        return self._command(home, "backup", str(source))

    def restore(self, home: Path, label: str, target: Path) -> Command:
        """Restore the latest snapshot below `target`."""
        return self._command(home, "restore", "latest", "--target", str(target))

    def check(self, home: Path) -> Command:
        """Verify the structure and every stored byte."""
        return self._command(home, "check", "--read-data")

    def list_snapshots(self, home: Path) -> Command:
        """Print the list of snapshots."""
        return self._command(home, "snapshots")

    def mount(self, home: Path, label: str, mountpoint: Path) -> Command:
        """Mount the latest snapshot; the command returns when the mount is usable."""
        return self._command(home, "mount", "latest", str(mountpoint))

    def mounted_root(self, mountpoint: Path) -> Path:
        """Return the path of the snapshot's root in the mount."""
        return mountpoint

    def unmount(self, mountpoint: Path) -> Command:
        """Unmount."""
        return Command((self._program, "umount", str(mountpoint)))

    def version(self) -> Command:
        """Start, print the version and end."""
        return Command((self._program, "version"))

    def _command(self, home: Path, *arguments: str) -> Command:
        return Command(
            (self._program, "-r", str(home / "repository"), *arguments),
            {"XDG_CACHE_HOME": str(home / "cache"), "XDG_STATE_HOME": str(home / "state")},
        )


def find_program() -> str | None:
    """Return the casfs beside the running interpreter, or the one on the PATH."""
    beside = Path(sys.executable).parent / NAME
    return str(beside) if beside.is_file() else shutil.which(NAME)
