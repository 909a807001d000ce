"""The limits of the machine: ordinary tools for the same work, which keep no versions.

None of them waits until its output is on the disk, as backup programs do.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from bench.corpus import Corpus
from bench.measure import Command, run
from bench.reading import PROBES, do_reading, prepare_reading
from bench.records import Sample
from bench.stage import WORK_TIMEOUT_S, Stage, TrialError, compare, sample_of
from bench.works import COPIES, FILE_READINGS, TREE_READINGS, Work

LIMIT = "limit"
TREE_LIMITS = {
    Work.FIRST: "tar | zstd -3 -T0",
    Work.UNCHANGED: "find -printf",
    Work.RESTORE: "cp -a",
    Work.FIND: "find in the source",
    Work.COPY: "cp -a of the source",
    Work.GREP: "grep -r in the source",
    Work.DISK_USAGE: "du of the source",
    Work.CAT: "cat of the source",
    Work.READERS: "cat of the source, four at once",
    Work.RSYNC: "rsync -a of the source",
    Work.GIT_STATUS: "git status in the source",
}
FILE_LIMITS = {
    Work.FIRST: "zstd -3 -T2",
    Work.REREAD: "BLAKE3, one core",
    Work.CHANGED: "BLAKE3, one core",
    Work.RESTORE: "cp -a",
    Work.CHECK: "BLAKE3 of the source, one core",
    Work.READ: "dd of the source",
    Work.READ_AGAIN: "dd of the source",
    Work.RANDOM: "reads of the source",
}
STARTUP_LIMIT = "python -c pass"


def limit_label(work: str, single: bool) -> str:
    """Return the tool that shows the limit for a work, empty if there is none."""
    limits = FILE_LIMITS if single else TREE_LIMITS
    return STARTUP_LIMIT if work == Work.STARTUP else limits.get(Work(work), "")


def startup_command() -> Command:
    """Return the command of an interpreter that does nothing."""
    return Command((sys.executable, "-c", "pass"))


def missing_tools() -> tuple[str, ...]:
    """Return the tools that this machine does not have."""
    wanted = ("tar", "zstd", "find", "cp", "grep", "dd", "du", "xargs", "rsync", "git")
    return tuple(tool for tool in wanted if shutil.which(tool) is None)


class LimitTrial:
    """The ordinary tools on a corpus, one for each work."""

    name = LIMIT

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def does(self, work: Work) -> bool:
        """Return whether there is a tool for a work."""
        return bool(limit_label(work, self._stage.corpus.single is not None))

    def perform(self, work: Work, repetition: int) -> list[Sample]:
        """Do a work once."""
        stage = self._stage
        reading = work in TREE_READINGS or work in FILE_READINGS
        target = stage.make_target(work)
        samples = []
        try:
            if reading:
                prepare_reading(work, stage, target)
                stage.cache.drop()
                usage = do_reading(work, stage, stage.source, target, repetition)
                if work in COPIES:
                    compare(stage.facts, target / stage.source.name)
            else:
                stage.cache.warm(stage.source)
                command = _warm_command(work, stage.corpus, stage.source, target)
                usage = run(command, stage.log, WORK_TIMEOUT_S)
                if work is Work.RESTORE:
                    compare(stage.facts, target / stage.source.name)
            sample = sample_of(stage, work, self.name, repetition, usage)
            samples.append(sample)
            if work is Work.READ:
                again = do_reading(Work.READ_AGAIN, stage, stage.source, target, repetition)
                samples.append(sample_of(stage, Work.READ_AGAIN, self.name, repetition, again))
        finally:
            stage.discard_target(target)
        return samples

    def clear(self) -> None:
        """Do nothing: the tools keep no repository."""


def _warm_command(work: Work, corpus: Corpus, source: Path, target: Path) -> Command:
    if work is Work.RESTORE:
        return Command(("cp", "-a", str(source), str(target)))
    if corpus.single is not None:
        file = str(source / corpus.single)
        if work is Work.FIRST:
            return Command(("zstd", "-3", "-T2", "-q", file, "-o", str(target / "file.zst")))
        if work in (Work.REREAD, Work.CHANGED, Work.CHECK):
            return Command((sys.executable, str(PROBES / "hash_files.py"), file))
    elif work is Work.FIRST:
        pipeline = 'set -o pipefail; tar -cf - -C "$0" . | zstd -3 -T0 -q -o "$1"'
        return Command(("bash", "-c", pipeline, str(source), str(target / "tree.tar.zst")))
    elif work is Work.UNCHANGED:
        return Command(("find", str(source), "-printf", "%p %y %s %T@ %C@ %i\\n"))
    raise TrialError(f"there is no tool for {work}")
