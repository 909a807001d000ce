"""The command locks: list the processes that use a repository."""

from __future__ import annotations

import os

import click

from casfs.cli.options import repository_options
from casfs.cli.output import format_time, iso_time
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.display import escape_path


@click.command(cls=Verb)
@repository_options
@click.pass_obj
def locks(settings: Settings) -> None:
    """List the commands that use the repository, and their hosts.

    Several commands may read and write at the same time. One command at a time maintains the repository
    (prune, repair snapshots), beside those. `repair index` is exclusive: it runs beside readers only. The
    system ends a lock with its process.
    """
    from casfs.repository.place import local_root, read_config
    from casfs.storage.locks import LockMode, list_locks

    activities = {
        LockMode.READER: "reads",
        LockMode.SHARED: "writes",
        LockMode.MAINTENANCE: "maintains",
        LockMode.EXCLUSIVE: "exclusive",
    }
    place = settings.repository()
    root = local_root(place, "locks")
    read_config(place)
    folder = root / "locks"
    found = list_locks(folder) if folder.is_dir() else {}
    output = settings.output()
    rows = []
    for _, lock in sorted(found.items(), key=lambda item: item[1].since_ns):
        activity = activities[lock.mode]
        verb, host = (escape_path(os.fsencode(text)) for text in (lock.verb, lock.host))
        rows.append((activity, verb, host, str(lock.pid), format_time(lock.since_ns)))
        output.emit(
            "lock",
            activity=activity,
            command=lock.verb,
            host=lock.host,
            pid=lock.pid,
            since=iso_time(lock.since_ns),
        )
    if rows:
        output.table(
            ("activity", "command", "host", "process", "since"), ("process",), rows, {"host": 6}
        )
    else:
        output.line("no command uses the repository")
