"""How borg 1.4 is called: a repository without encryption, and new caches for every run."""

from __future__ import annotations

import shutil
from pathlib import Path

from bench.measure import Command

SERIES = "1.4"


class Borg:
    """Borg with one of its compressions; lz4 is its default."""

    mount_stays = True

    def __init__(self, program: str, name: str, compression: str, first_backup_only: bool) -> None:
        self.name = name
        self.label = f"borg ({compression})"
        self.first_backup_only = first_backup_only
        self._program = program
        self._compression = compression

    def initialise(self, home: Path) -> Command:
        """Make the repository."""
        return self._command(home, "init", "--encryption", "none", str(home / "repository"))

    def backup(self, home: Path, source: Path, label: str) -> Command:
        """Back up `source` under its absolute path."""
        return self._command(
            home, "create", "--compression", self._compression, _archive(home, label), str(source)
        )

    def restore(self, home: Path, label: str, target: Path) -> Command:
        """Restore an archive below `target`."""
        return self._command(home, "extract", _archive(home, label), directory=target)

    def check(self, home: Path) -> Command:
        """Verify the repository, the archives and every stored byte."""
        return self._command(home, "check", "--verify-data", str(home / "repository"))

    def list_snapshots(self, home: Path) -> Command:
        """Print the list of archives."""
        return self._command(home, "list", str(home / "repository"))

    def mount(self, home: Path, label: str, mountpoint: Path) -> Command:
        """Mount an archive and serve it until it is unmounted."""
        return self._command(home, "mount", "--foreground", _archive(home, label), str(mountpoint))

    def mounted_root(self, mountpoint: Path) -> Path:
        """Return the path of the archive's root in the mount."""
        return mountpoint

    def unmount(self, mountpoint: Path) -> Command:
        """Unmount."""
        return Command((self._program, "umount", str(mountpoint)))

    def version(self) -> Command:
        """Start, print the version and end."""
        return Command((self._program, "--version"))

    def _command(self, home: Path, *arguments: str, directory: Path | None = None) -> Command:
        return Command(
            (self._program, *arguments),
            {
                "BORG_BASE_DIR": str(home / "cache"),
                "BORG_FUSE_IMPL": "pyfuse3",
                "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
                "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
            },
            directory,
        )


def _archive(home: Path, label: str) -> str:
    return f"{home / 'repository'}::{label}"


def find_program(peers: Path) -> str | None:
    """Return the borg of the benchmark's own environment, or the one on the PATH."""
    own = peers / "bin" / "borg"
    return str(own) if own.is_file() else shutil.which("borg")
