"""Measure reads of a mounted snapshot, and how long a program takes to start.

Everything is done by ordinary programs in processes of their own, so that a server that hangs
leaves the harness able to end it.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path

from bench.measure import Command, Usage, run
from bench.stage import WORK_TIMEOUT_S, Stage, TrialError
from bench.works import Work

STARTUPS = 7
READERS = 4
RANDOM_READS = 500
RANDOM_READS_QUICK = 50
# Found nowhere, so that every byte of every file is looked at.
GREP_PATTERN = "no-file-holds-" + "these-words"
PROBES = Path(__file__).parent / "probes"


def prepare_reading(work: Work, stage: Stage, target: Path) -> None:
    """Make what a work needs beside the corpus: for `git status`, a repository outside of it."""
    if work is Work.GIT_STATUS:
        git = str(target / "git")
        quickly = ("-c", "core.compression=0", "-c", "core.fsync=none", "-c", "gc.auto=0")
        for arguments in (
            ("git", "init", "--quiet", "--bare", git),
            ("git", *quickly, *_git_folders(git, stage.source), "add", "--all"),
        ):
            run(Command(arguments), stage.log, WORK_TIMEOUT_S)


def do_reading(work: Work, stage: Stage, folder: Path, target: Path, repetition: int) -> Usage:
    """Read the corpus in `folder` as users do; return the cost of the reader."""
    single = str(folder / (stage.corpus.single or ""))
    if work is Work.FIND:
        usage = run(Command(("find", str(folder))), stage.log, WORK_TIMEOUT_S)
        names = stage.log.read_bytes().count(b"\n")
        if names < stage.facts.entries:
            raise TrialError(f"find gave {names} names of {stage.facts.entries}")
        return usage
    if work is Work.COPY:
        command = Command(("cp", "-a", str(folder), str(target)))
    elif work is Work.GREP:
        command = Command(
            ("grep", "-r", "-F", "-l", "-e", GREP_PATTERN, str(folder)),
            {"LC_ALL": "C"},
            good_exits=frozenset({1}),
        )
    elif work is Work.DISK_USAGE:
        command = Command(("du", "-s", str(folder)))
    elif work in (Work.CAT, Work.READERS):
        readers = READERS if work is Work.READERS else 1
        pipeline = 'find "$0" -type f -print0 | xargs -0 -n 64 -P "$1" cat > /dev/null'
        command = Command(("sh", "-c", pipeline, str(folder), str(readers)))
    elif work is Work.RSYNC:
        command = Command(("rsync", "-a", str(folder), str(target)))
    elif work is Work.GIT_STATUS:
        # Inode numbers differ from those that git knows, so it reads every file.
        folders = _git_folders(str(target / "git"), folder)
        command = Command(("git", *folders, "status", "--porcelain"))
    elif work is Work.RANDOM:
        count = RANDOM_READS_QUICK if stage.quick else RANDOM_READS
        probe = str(PROBES / "random_reads.py")
        command = Command((sys.executable, probe, single, str(count), str(repetition)))
        usage = run(command, stage.log, WORK_TIMEOUT_S)
        return replace(usage, wall_s=float(stage.log.read_text(encoding="ascii")))
    else:
        command = Command(("dd", f"if={single}", "of=/dev/null", "bs=1M"))
    return run(command, stage.log, WORK_TIMEOUT_S)


def _git_folders(git: str, tree: Path) -> tuple[str, str]:
    return f"--git-dir={git}", f"--work-tree={tree}"


def measure_startup(command: Command, log: Path) -> Usage:
    """Return the median start of several, after one that is not counted."""
    usages = [run(command, log, WORK_TIMEOUT_S) for _ in range(STARTUPS + 1)][1:]
    median_s = statistics.median(each.wall_s for each in usages)
    return min(usages, key=lambda each: abs(each.wall_s - median_s))
