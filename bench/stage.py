"""A corpus on disk, and the parts that all trials on it share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.caches import KernelCache
from bench.corpus import Corpus, survey
from bench.measure import Usage
from bench.records import CorpusFacts, Sample
from bench.scratch import Scratch
from bench.works import COPIES, Work

WORK_TIMEOUT_S = 3600.0


class TrialError(Exception):
    """A work had a wrong result, or cannot be done now."""


@dataclass(slots=True)
class Stage:
    """A corpus on disk, with the scratch folder and the cache that all trials on it share."""

    corpus: Corpus
    facts: CorpusFacts
    source: Path
    scratch: Scratch
    cache: KernelCache
    quick: bool
    copies: Path | None = None
    """A folder in memory for what is copied out of a mount; None if there is none with enough room."""

    def make_target(self, work: Work) -> Path:
        """Create the folder for the output of a work.

        Copies out of a mount go to memory if possible, because the time to create files on a disk
        depends on what was removed there before.
        """
        if work in COPIES and self.copies is not None:
            target = self.copies / "target"
            target.mkdir()
            return target
        return self.scratch.make("target")

    def discard_target(self, target: Path) -> None:
        """Remove what `make_target` returned, at once or later."""
        if target.parent == self.copies:
            self.scratch.remove(target)
        else:
            self.scratch.discard(target)

    @property
    def log(self) -> Path:
        """The file that receives the output of the measured program."""
        return self.scratch.folder / "output.log"

    @property
    def work_bytes(self) -> int:
        """The bytes of the corpus's files."""
        return self.facts.file_bytes


def compare(facts: CorpusFacts, folder: Path) -> None:
    """Raise TrialError if a folder does not have the corpus's number of entries and bytes."""
    found = survey(facts.name, "", folder)
    wanted = (facts.entries, facts.files, facts.file_bytes)
    if (found.entries, found.files, found.file_bytes) != wanted:
        raise TrialError(
            f"{found.entries} entries with {found.file_bytes} bytes came out instead of "
            f"{facts.entries} with {facts.file_bytes}"
        )


def sample_of(stage: Stage, work: Work, program: str, repetition: int, usage: Usage) -> Sample:
    """Return the record of a finished work."""
    return Sample(
        corpus=stage.corpus.name,
        work=work.value,
        program=program,
        repetition=repetition,
        wall_s=usage.wall_s,
        cpu_s=usage.cpu_s,
        peak_bytes=usage.peak_bytes,
        foreign_cpu_s=usage.foreign_cpu_s,
        work_bytes=stage.work_bytes,
    )
