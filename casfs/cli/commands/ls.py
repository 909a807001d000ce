"""The command ls: list a directory of a snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casfs.cli.app import EXIT_DAMAGED
from casfs.cli.options import (
    as_of_option,
    common_options,
    complete_snapshots,
    snapshot_filter_options,
)
from casfs.cli.progress import CommandMonitor
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb

if TYPE_CHECKING:
    from casfs.digest import SnapshotId
    from casfs.format.snapshot import Snapshot

    Found = tuple[SnapshotId, Snapshot]


@click.command(cls=Verb, context_settings={"help_option_names": ["--help"]})
@click.argument("snap", metavar="SNAP[:PATH]", shell_complete=complete_snapshots)
@click.option("--recursive", "-R", is_flag=True, help="List everything below PATH.")
@click.option("--human-readable", "-h", "human", is_flag=True, help="Print sizes with units.")
@as_of_option
@snapshot_filter_options
@common_options
@click.pass_obj
def ls(settings: Settings, snap: str, recursive: bool, human: bool) -> int:
    """List the entries of a snapshot, or of a directory in it.

    SNAP lists everything, SNAP:PATH only the entries of that directory (`:/` is the root).

    A directory's size is that of all files below it. A mark shows files that were written to during the
    capture: `changed` (old and new data may be mixed) or `appended` (the beginning was captured).
    """
    from casfs.cli.entry_format import NodeFields, NodeLines
    from casfs.query.find import Finder, Query
    from casfs.repository.opening import OpenOptions, open_for_reading

    output = settings.output()
    monitor = CommandMonitor(output, "ls")
    with open_for_reading(settings.repository(), OpenOptions(unlock=settings.unlock)) as repository:
        _, snapshot, path, node = repository.snapshots.resolve_path(
            snap, settings.snapshot_filter()
        )
        fields = NodeFields(snapshot).fields
        line = NodeLines(snapshot, node, human).line
        whole = recursive or ":" not in snap
        if whole or node.tree is None:
            entries = Finder(repository.trees, Query(), monitor).find(node, path)
        else:
            above = path + b"/" if path else b""
            entries = ((above + entry.name, entry) for entry in repository.trees.nodes(node.tree))
        for below, entry in entries:
            if output.as_json:
                output.emit("node", **fields(below, entry))
            else:
                output.line(line(below if whole or node.tree is None else entry.name, entry))
    return EXIT_DAMAGED if monitor.problems else 0
