"""The command tag: change the tags of a snapshot."""

from __future__ import annotations

import os

import click

from casfs.cli.options import (
    common_options,
    complete_snapshots,
    complete_tags,
    snapshot_filter_options,
)
from casfs.cli.output import iso_time
from casfs.cli.param_types import TAGS
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.digest import short_id
from casfs.display import escape_path
from casfs.errors import UsageError


@click.command(cls=Verb)
@click.argument("snap", metavar="SNAP", shell_complete=complete_snapshots)
@click.option("--add", "added", type=TAGS, multiple=True, metavar="TAG[,TAG...]", help="Add tags.")
@click.option(
    "--remove",
    "removed",
    multiple=True,
    shell_complete=complete_tags,
    metavar="TAG[,TAG...]",
    help="Remove tags.",
)
@click.option(
    "--set",
    "replaced",
    type=TAGS,
    multiple=True,
    metavar="TAG[,TAG...]",
    help="Replace all tags by these.",
)
@snapshot_filter_options
@common_options
@click.pass_obj
def tag(
    settings: Settings,
    snap: str,
    added: tuple[frozenset[str], ...],
    removed: tuple[str, ...],
    replaced: tuple[frozenset[str], ...],
) -> None:
    """Change the tags of a snapshot, which gets a new id."""
    from casfs.repository.opening import OpenOptions, open_for_writing

    if not (added or removed or replaced):
        raise UsageError("give --add, --remove or --set")
    if replaced and (added or removed):
        raise UsageError("--set excludes --add and --remove")
    wanted = frozenset[str]().union(*(replaced or added))
    # Not TAGS: a snapshot of an early version may have an empty tag, or one with a comma in it.
    unwanted = {tag for text in removed for tag in (text, *text.split(","))}
    with open_for_writing(
        settings.repository(), "tag", OpenOptions(unlock=settings.unlock, sync=settings.sync)
    ) as repository:
        old_id, old = repository.snapshots.resolve(snap, settings.snapshot_filter())
        repository.snapshots.provenance.require_proven(old_id, "a change of its tags")
        tags = wanted if replaced else set(old.tags) - unwanted | wanted
        new_id, new = repository.snapshots.retag(old_id, old, tuple(sorted(tags)))
    output = settings.output()
    shown_tags = ", ".join(escape_path(os.fsencode(tag)) for tag in new.tags) or "none"
    if new_id == old_id:
        output.line(f"snapshot {short_id(old_id)} is unchanged, tags: {shown_tags}")
    else:
        output.line(f"snapshot {short_id(old_id)} is now {short_id(new_id)}, tags: {shown_tags}")
    output.emit(
        "snapshot",
        id=new_id.hex(),
        replaces=old_id.hex(),
        time=iso_time(new.time_ns),
        tags=list(new.tags),
    )
