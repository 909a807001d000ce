"""The command rewrite: publish snapshots again without some paths."""

from __future__ import annotations

import click

from casfs.cli.options import (
    common_options,
    pattern_option,
    progress_options,
    snapshot_filter_options,
)
from casfs.cli.output import json_path
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.digest import short_id
from casfs.display import escape_path
from casfs.errors import NotFoundError, UsageError
from casfs.patterns import Pattern


@click.command(cls=Verb)
@click.argument("snaps", nargs=-1, required=True, metavar="SNAP...")
@pattern_option(
    "--exclude",
    "excludes",
    "Leave out entries that match (gitignore syntax, from the snapshot's root); repeatable.",
)
@click.option("--dry-run", "-n", is_flag=True, help="List what would be left out; change nothing.")
@snapshot_filter_options
@progress_options
@common_options
@click.pass_obj
def rewrite(
    settings: Settings, snaps: tuple[str, ...], excludes: tuple[Pattern, ...], dry_run: bool
) -> None:
    """Rewrite snapshots without the paths that match --exclude.

    A rewritten snapshot has a new id and replaces the old one. `casfs prune` then frees the data that no
    snapshot needs. SNAP is an id, the beginning of an id, `latest`, or `all`.
    """
    from casfs.maintenance.rewrite import rewrite_snapshot
    from casfs.repository.opening import OpenOptions, open_for_maintenance, open_for_reading

    if not excludes:
        raise UsageError("name what to leave out: --exclude PATTERN")
    output = settings.output()
    monitor = settings.monitor("rewrite")
    place = settings.repository()
    options = OpenOptions(unlock=settings.unlock, sync=settings.sync)
    opened = (
        open_for_reading(place, options)
        if dry_run
        else open_for_maintenance(place, "rewrite", options)
    )
    matched = False
    with opened as repository, monitor:
        store = repository.snapshots
        if "all" in snaps:
            chosen = list(store.iterate())
        else:
            chosen = [store.resolve(snap, settings.snapshot_filter()) for snap in snaps]
        for snapshot_id, snapshot in dict(chosen).items():
            found = rewrite_snapshot(repository, snapshot_id, snapshot, excludes, monitor, dry_run)
            matched = matched or bool(found.removed)
            for path in found.removed:
                output.summary(
                    f"{short_id(snapshot_id)}: {'would leave' if dry_run else 'left'} out {escape_path(path)}"
                )
            if found.new_id is not None:
                output.summary(f"snapshot {short_id(snapshot_id)} is now {short_id(found.new_id)}")
            elif not found.removed:
                output.summary(f"snapshot {short_id(snapshot_id)} has nothing that matches")
            output.emit(
                "rewritten",
                id=found.new_id.hex() if found.new_id is not None else None,
                replaces=snapshot_id.hex(),
                removed_entries=[json_path(path) for path in found.removed],
                dry_run=dry_run,
            )
    if not matched:
        raise NotFoundError("nothing in these snapshots matches --exclude; nothing was changed")
