"""How casfs and restic are called with a repository in an object storage behind a line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.measure import Command
from bench.remote.object_server import credentials


class RemoteProgram(Protocol):
    """A backup program whose repository `name` in the bucket is reached through a port of 127.0.0.1.

    `home` has the program's caches. Every method returns the command of one work.
    """

    @property
    def name(self) -> str:
        """The name in the results."""

    @property
    def mount_stays(self) -> bool:
        """Whether the mount is served by the command itself, which then does not end."""

    def initialise(self, home: Path, port: int, name: str) -> Command:
        """Make the repository."""

    def backup(self, home: Path, port: int, name: str, source: Path) -> Command:
        """Back up `source`."""

    def restore(self, home: Path, port: int, name: str, source: Path, target: Path) -> Command:
        """Restore a file or a folder of the latest snapshot below `target`."""

    def find(self, home: Path, port: int, name: str, pattern: str) -> Command:
        """Find names in the latest snapshot."""

    def mount(self, home: Path, port: int, name: str, mountpoint: Path) -> Command:
        """Mount the repository."""

    def mounted_root(self, mountpoint: Path) -> Path:
        """Return the path of the latest snapshot's root in the mount."""

    def forget_first(self, home: Path, port: int, name: str) -> Command:
        """Remove all snapshots except the latest, without freeing space."""

    def prune(self, home: Path, port: int, name: str) -> Command:
        """Free the space of removed snapshots."""


@dataclass(frozen=True, slots=True)
class RemoteCasfs:
    """casfs with its defaults."""

    program: str
    bucket: str
    name: str = "casfs"
    mount_stays: bool = False

    def initialise(self, home: Path, port: int, name: str) -> Command:
        """Make the repository."""
        return self._command(home, port, name, "init")

    def backup(self, home: Path, port: int, name: str, source: Path) -> Command:
        """Back up `source`."""
        return self._command(home, port, name, "backup", str(source))

    def restore(self, home: Path, port: int, name: str, source: Path, target: Path) -> Command:
        """Restore a file or a folder of the latest snapshot."""
        what = f"latest:{source}"
        return self._command(home, port, name, "restore", what, "--target", str(target))

    def find(self, home: Path, port: int, name: str, pattern: str) -> Command:
        """Find names in the latest snapshot."""
        return self._command(home, port, name, "find", pattern, "--snapshot", "latest")

    def mount(self, home: Path, port: int, name: str, mountpoint: Path) -> Command:
        """Mount the latest snapshot; the command returns when the mount is usable."""
        return self._command(home, port, name, "mount", "latest", str(mountpoint))

    def mounted_root(self, mountpoint: Path) -> Path:
        """Return the path of the snapshot's root in the mount."""
        return mountpoint

    def forget_first(self, home: Path, port: int, name: str) -> Command:
        """Remove all snapshots except the latest."""
        return self._command(home, port, name, "forget", "--keep-last", "1")

    def prune(self, home: Path, port: int, name: str) -> Command:
        """Free the space of removed snapshots."""
        return self._command(home, port, name, "prune")

    def _command(self, home: Path, port: int, name: str, *arguments: str) -> Command:
        return Command(
            (self.program, "-r", f"s3://{self.bucket}/{name}", *arguments),
            {
                **credentials(),
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "XDG_CACHE_HOME": str(home / "cache"),
                "XDG_STATE_HOME": str(home / "state"),
            },
        )


@dataclass(frozen=True, slots=True)
class RemoteRestic:
    """restic with its defaults, which always include encryption."""

    program: str
    bucket: str
    options: tuple[str, ...] = ()
    password: Mapping[str, str] | None = None
    name: str = "restic"
    mount_stays: bool = True

    def initialise(self, home: Path, port: int, name: str) -> Command:
        """Make the repository."""
        return self._command(home, port, name, "init")

    def backup(self, home: Path, port: int, name: str, source: Path) -> Command:
        """Back up `source`."""
        return self._command(home, port, name, "backup", str(source))

    def restore(self, home: Path, port: int, name: str, source: Path, target: Path) -> Command:
        """Restore a file or a folder of the latest snapshot."""
        return self._command(
            home,
            *(port, name, "restore", "latest"),
            *("--include", str(source), "--target", str(target)),
        )

    def find(self, home: Path, port: int, name: str, pattern: str) -> Command:
        """Find names in the latest snapshot."""
        return self._command(home, port, name, "find", "--snapshot", "latest", pattern)

    def mount(self, home: Path, port: int, name: str, mountpoint: Path) -> Command:
        """Mount the repository and serve it until it is unmounted."""
        return self._command(home, port, name, "mount", str(mountpoint))

    def mounted_root(self, mountpoint: Path) -> Path:
        """Return the path of the latest snapshot's root in the mount."""
        return mountpoint / "snapshots" / "latest"

    def forget_first(self, home: Path, port: int, name: str) -> Command:
        """Remove all snapshots except the latest."""
        return self._command(home, port, name, "forget", "--keep-last", "1")

    def prune(self, home: Path, port: int, name: str) -> Command:
        """Free the space of removed snapshots."""
        return self._command(home, port, name, "prune")

    def _command(self, home: Path, port: int, name: str, *arguments: str) -> Command:
        repository = f"s3:http://127.0.0.1:{port}/{self.bucket}/{name}"
        return Command(
            (self.program, *self.options, "--repo", repository, *arguments),
            {
                **credentials(),
                **(self.password if self.password is not None else {"RESTIC_PASSWORD": "bench"}),
                "RESTIC_CACHE_DIR": str(home / "cache"),
            },
        )
