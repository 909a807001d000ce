"""The works that are measured, in their order in one repetition."""

from __future__ import annotations

from enum import StrEnum

from bench.corpus import Corpus

NO_CORPUS = "none"


class Work(StrEnum):
    """A task that a user waits for. Its value names it on the command line and in results."""

    STARTUP = "start-up"
    FIRST = "first-backup"
    LIST = "list"
    UNCHANGED = "unchanged-backup"
    REREAD = "touched-backup"
    CHANGED = "changed-backup"
    DAILY = "daily-backups"
    RESTORE = "restore"
    CHECK = "check"
    MOUNT = "mount"
    FIND = "find"
    COPY = "copy-out"
    GREP = "grep"
    DISK_USAGE = "du"
    CAT = "cat"
    READERS = "readers"
    RSYNC = "rsync"
    GIT_STATUS = "git-status"
    READ = "read"
    READ_AGAIN = "read-again"
    RANDOM = "random-read"


LABELS = {
    Work.STARTUP: "start-up, saying the version",
    Work.FIRST: "first backup",
    Work.LIST: "the list of snapshots printed",
    Work.UNCHANGED: "backup with nothing changed",
    Work.REREAD: "backup after `touch`: all read, nothing new",
    Work.CHANGED: "backup after the blocks changed",
    Work.DAILY: "the daily backups together",
    Work.RESTORE: "restore",
    Work.CHECK: "check, reading all data",
    Work.MOUNT: "mount until usable (cold)",
    Work.FIND: "`find` on a fresh mount (cold)",
    Work.COPY: "`cp -a` out of a fresh mount (cold)",
    Work.GREP: "`grep -r` in a fresh mount (cold)",
    Work.DISK_USAGE: "`du` on a fresh mount (cold)",
    Work.CAT: "`cat` of every file in a fresh mount (cold)",
    Work.READERS: "the same `cat` by four readers at once (cold)",
    Work.RSYNC: "`rsync -a` out of a fresh mount (cold)",
    Work.GIT_STATUS: "`git status` in a fresh mount (cold)",
    Work.READ: "`dd` through a fresh mount (cold)",
    Work.READ_AGAIN: "the same `dd` again",
    Work.RANDOM: "random reads of 4 KiB in a fresh mount (cold)",
}

TREE_READINGS = (
    Work.FIND,
    Work.COPY,
    Work.GREP,
    Work.DISK_USAGE,
    Work.CAT,
    Work.READERS,
    Work.RSYNC,
    Work.GIT_STATUS,
)
FILE_READINGS = (Work.READ, Work.READ_AGAIN, Work.RANDOM)
MOUNTED = frozenset({Work.MOUNT, *TREE_READINGS, *FILE_READINGS})
COPIES = frozenset({Work.COPY, Work.RSYNC})
BACKUPS = frozenset({Work.FIRST, Work.UNCHANGED, Work.REREAD, Work.CHANGED, Work.DAILY})


def works_on(corpus: Corpus) -> tuple[Work, ...]:
    """Return the works that make sense on a corpus, in order."""
    if corpus.name == "image":
        return (Work.FIRST, Work.CHANGED, Work.RESTORE, Work.CHECK)
    if corpus.name == "daily":
        return (Work.FIRST, Work.UNCHANGED, Work.DAILY, Work.CHECK)
    if corpus.single is not None:
        return (Work.FIRST, Work.REREAD, Work.RESTORE, Work.CHECK, *FILE_READINGS)
    return (
        Work.FIRST,
        Work.LIST,
        Work.UNCHANGED,
        Work.RESTORE,
        Work.CHECK,
        Work.MOUNT,
        *TREE_READINGS,
    )
