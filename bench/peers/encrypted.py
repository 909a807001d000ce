"""casfs with an encrypted repository: backups have no identity, all other commands get one."""

from __future__ import annotations

from pathlib import Path

from bench.measure import Command
from bench.peers.casfs import Casfs
from casfs.crypto.age import new_identity

IDENTITY = "identity.txt"


class EncryptedCasfs(Casfs):
    """The project's own command; the identity is beside the repository, in the scratch folder."""

    name = "casfs-encrypted"
    label = "casfs, encrypted"

    def initialise(self, home: Path) -> Command:
        """Make a repository that is encrypted to a fresh identity."""
        secret, recipient = new_identity()
        (home / IDENTITY).write_text(f"{secret}\n")
        return self._command(home, "init", "--recipient", recipient)

    def restore(self, home: Path, label: str, target: Path) -> Command:
        """Restore the latest snapshot below `target`."""
        return self._opened(home, super().restore(home, label, target))

    def check(self, home: Path) -> Command:
        """Verify the structure and every stored byte."""
        return self._opened(home, super().check(home))

    def list_snapshots(self, home: Path) -> Command:
        """Print the list of snapshots."""
        return self._opened(home, super().list_snapshots(home))

    def mount(self, home: Path, label: str, mountpoint: Path) -> Command:
        """Mount the latest snapshot; the command returns when the mount is usable."""
        return self._opened(home, super().mount(home, label, mountpoint))

    def _opened(self, home: Path, command: Command) -> Command:
        return Command(
            command.argv, {**command.environment, "CASFS_IDENTITY": str(home / IDENTITY)}
        )
