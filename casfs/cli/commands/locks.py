"""The command locks: list the processes that use a repository."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import click

from casfs.cli.options import repository_options
from casfs.cli.output import format_time, iso_time
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.display import escape_path

if TYPE_CHECKING:
    from casfs.repository.presence import PresentProcess


@click.command(cls=Verb)
@repository_options
@click.pass_obj
def locks(settings: Settings) -> None:
    """List the commands that use the repository, and their hosts.

    Several commands may read and write at the same time. One command at a time maintains the repository
    (prune, repair snapshots), beside those. `repair index` is exclusive: it runs beside readers only. The
    system ends a lock with its process.

    Hosts that use the repository over a network hold no locks. They leave objects that are listed here and
    block no command. Such an object is stale if its process was not seen for half an hour.
    """
    from casfs.storage.locks import LockMode

    activities = {
        LockMode.READER: "reads",
        LockMode.SHARED: "writes",
        LockMode.MAINTENANCE: "maintains",
        LockMode.EXCLUSIVE: "exclusive",
    }
    output = settings.output()
    now_ns = time.time_ns()
    rows = []
    for process, is_remote in sorted(
        _processes(settings), key=lambda found: found[0].record.since_ns
    ):
        lock = process.record
        activity = activities[lock.mode]
        verb, host = (escape_path(os.fsencode(text)) for text in (lock.verb, lock.host))
        is_stale = is_remote and process.is_stale(now_ns)
        seen = f"stale, last {format_time(process.seen_ns)}" if is_stale else "now"
        rows.append((activity, verb, host, str(lock.pid), format_time(lock.since_ns), seen))
        output.emit(
            "lock",
            activity=activity,
            command=lock.verb,
            host=lock.host,
            pid=lock.pid,
            since=iso_time(lock.since_ns),
            seen=iso_time(process.seen_ns) if is_remote else None,
            stale=is_stale,
        )
    if rows:
        columns = ("activity", "command", "host", "process", "since", "seen")
        output.table(columns, ("process",), rows, {"host": 6})
    else:
        output.line("no command uses the repository")


def _processes(settings: Settings) -> list[tuple[PresentProcess, bool]]:
    """Return the processes that hold locks (False) and those with presence objects (True)."""
    from casfs.repository.place import LocalPlace
    from casfs.repository.presence import PresentProcess, present_processes
    from casfs.repository.remote_writers import is_shared

    place = settings.repository()
    storage = place.open_storage()
    found: list[tuple[PresentProcess, bool]] = []
    try:
        config = place.trust_root(storage).config
        if is_shared(storage):
            found += [(process, True) for process in present_processes(storage).values()]
    finally:
        storage.close()
    # A process of this machine may have both.
    shown = {(process.record.host, process.record.pid) for process, _ in found}
    if isinstance(place, LocalPlace):
        for lock in place.locks(config).held().values():
            if (lock.host, lock.pid) not in shown:
                found.append((PresentProcess(lock, lock.since_ns), False))
    return found
