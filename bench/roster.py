"""Find the programs that take part, with their versions, and those that are missing."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Command, CommandError, run
from bench.peers import borg, casfs, encrypted, restic
from bench.peers.limits import LIMIT, missing_tools
from bench.peers.memory_tree import LABELS, LOOPS
from bench.records import Missing, ProgramFacts
from bench.trial import BackupProgram

SETUP_HINT = "`python -m bench setup` installs it"
VERSION_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Roster:
    """The programs that take part, in the order of their turns, and those that cannot."""

    programs: tuple[BackupProgram, ...]
    facts: tuple[ProgramFacts, ...]
    missing: tuple[Missing, ...]


class _Builder:
    def __init__(self, peers: Path) -> None:
        self._peers = peers
        self.programs: list[BackupProgram] = []
        self.facts: list[ProgramFacts] = []
        self.missing: list[Missing] = []

    def add(self, program: BackupProgram, version: str) -> None:
        self.programs.append(program)
        self.facts.append(ProgramFacts(program.name, program.label, version))

    def casfs(self) -> None:
        path = casfs.find_program()
        version = path and self._version("casfs", path, "version")
        if path is None:
            self.missing.append(Missing("casfs", "it is not installed; `make dev` installs it"))
        elif version:
            self.add(casfs.Casfs(path), version)
            self.add(encrypted.EncryptedCasfs(path), version)

    def borg(self) -> None:
        path = borg.find_program(self._peers)
        version = path and self._version("borg", path, "--version")
        if path is None:
            self.missing.append(Missing("borg", f"it is not installed; {SETUP_HINT}"))
        elif version and not version.startswith(f"borg {borg.SERIES}."):
            self.missing.append(
                Missing("borg", f"only {version} is installed; {SETUP_HINT} in {borg.SERIES}")
            )
        elif version:
            self.add(borg.Borg(path, "borg", "lz4", False), version)
            self.add(borg.Borg(path, "borg-zstd", "zstd,3", True), version)

    def restic(self) -> None:
        path = restic.find_program(self._peers)
        version = path and self._version("restic", path, "version")
        if path is None:
            self.missing.append(Missing("restic", f"it is not installed; {SETUP_HINT}"))
        elif version:
            self.add(restic.Restic(path, version), version)

    def limits(self) -> None:
        self.facts.append(ProgramFacts(LIMIT, "the machine", ""))
        self.facts += [ProgramFacts(name, LABELS[name], "") for name in LOOPS]
        self.missing += [Missing(tool, "it is not installed") for tool in missing_tools()]

    def _version(self, name: str, path: str, argument: str) -> str | None:
        with tempfile.NamedTemporaryFile(prefix="casfs-bench-") as output:
            log = Path(output.name)
            try:
                run(Command((path, argument)), log, VERSION_TIMEOUT_S)
            except CommandError as error:
                self.missing.append(Missing(name, f"it does not start: {error.outcome}"))
                return None
            first_line = log.read_text(errors="replace").strip().partition("\n")[0]
        if not first_line.startswith(name):
            self.missing.append(Missing(name, "it starts and does not say its version"))
            return None
        return first_line


PROGRAMS = ("casfs", "casfs-encrypted", "borg", "borg-zstd", "restic", LIMIT, *LOOPS)


def call_roll(peers: Path, wanted: Collection[str]) -> Roster:
    """Find the selected programs; `peers` is the environment that `bench setup` creates."""
    builder = _Builder(peers)
    if "casfs" in wanted or "casfs-encrypted" in wanted:
        builder.casfs()
    if "borg" in wanted or "borg-zstd" in wanted:
        builder.borg()
    if "restic" in wanted:
        builder.restic()
    builder.limits()
    return Roster(
        tuple(each for each in builder.programs if each.name in wanted),
        tuple(each for each in builder.facts if each.name in wanted),
        tuple(builder.missing),
    )
