"""How restic is called: with its defaults, which always include encryption."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from bench.measure import Command

NAME = "restic"
FIRST_WITHOUT_PASSWORD = (0, 17)


class Restic:
    """Restic of either place that `bench setup` knows."""

    name = NAME
    label = "restic"
    first_backup_only = False
    mount_stays = True

    def __init__(self, program: str, version: str) -> None:
        self._program = program
        self._options: tuple[str, ...] = ()
        self._password = {"RESTIC_PASSWORD": "benchmark"}
        if _version_numbers(version) >= FIRST_WITHOUT_PASSWORD:
            self._options = ("--insecure-no-password",)
            self._password = {}

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
        """Mount the repository and serve it until it is unmounted."""
        return self._command(home, "mount", str(mountpoint))

    def mounted_root(self, mountpoint: Path) -> Path:
        """Return the path of the latest snapshot's root in the mount."""
        return mountpoint / "snapshots" / "latest"

    def unmount(self, mountpoint: Path) -> Command:
        """Unmount by an interrupt, as restic expects."""
        return Command(("fusermount3", "-u", str(mountpoint)))

    def version(self) -> Command:
        """Start, print the version and end."""
        return Command((self._program, "version"))

    def _command(self, home: Path, *arguments: str) -> Command:
        return Command(
            (self._program, *self._options, "--repo", str(home / "repository"), *arguments),
            {**self._password, "RESTIC_CACHE_DIR": str(home / "cache")},
        )


def _version_numbers(text: str) -> tuple[int, ...]:
    found = re.search(r"(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else ()


def newest_program(peers: Path) -> Path:
    """Return where `bench setup` puts the newest restic; `peers` is its environment."""
    return peers / "restic" / NAME


def find_program(peers: Path) -> str | None:
    """Return the newest restic, or the one on the PATH."""
    newest = newest_program(peers)
    return str(newest) if newest.is_file() else shutil.which(NAME)
