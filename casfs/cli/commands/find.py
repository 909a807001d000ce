"""The command find: search snapshots for names."""

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
from casfs.cli.output import Output, path_argument, report_omitted, warn_of_unproven
from casfs.cli.param_types import SIZE_RANGE, parse_time
from casfs.cli.progress import CommandMonitor
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.digest import short_id
from casfs.display import escape_path
from casfs.errors import UsageError

if TYPE_CHECKING:
    from casfs.digest import SnapshotId
    from casfs.format.snapshot import Snapshot
    from casfs.format.tree import Node
    from casfs.repository.repository import Repository
    from casfs.repository.snapshot_filter import SnapshotFilter

    Found = tuple[SnapshotId, Snapshot]


@click.command(cls=Verb)
@click.argument("pattern", required=False)
@click.option(
    "--snapshot",
    "snaps",
    multiple=True,
    metavar="SNAP[:PATH]",
    shell_complete=complete_snapshots,
    help="Search this snapshot [default: all]; repeatable.",
)
@click.option("--changed", "only_flagged", is_flag=True, help="Only files flagged as changed.")
@click.option(
    "--type",
    "kind",
    type=click.Choice(list("fdlpscb")),
    help="Only files, directories, symlinks, pipes, sockets, character devices or block devices.",
)
@click.option(
    "--size",
    "size_range",
    type=SIZE_RANGE,
    metavar="[+|-]SIZE",
    help="Only files larger (+10M) or smaller (-10M) than this, or of exactly this size.",
)
@click.option(
    "--newer", metavar="TIME", help="Only entries modified after this time, ISO 8601 or @SECONDS."
)
@click.option("--ignore-case", "-i", is_flag=True, help="Ignore the case of letters.")
@click.option("--long", "-l", "is_long", is_flag=True, help="Print mode, owner, size and time too.")
@as_of_option
@snapshot_filter_options
@common_options
@click.pass_obj
def find(
    settings: Settings,
    pattern: str | None,
    snaps: tuple[str, ...],
    only_flagged: bool,
    kind: str | None,
    size_range: tuple[int, int | None] | None,
    newer: str | None,
    ignore_case: bool,
    is_long: bool,
) -> int:
    """Search snapshots for names, the newest snapshot first.

    PATTERN is a shell glob for the name, or for the whole path if it contains a slash; its * matches
    slashes too. It may be left out where an option selects entries. Without --snapshot, --host, --tag and
    --path select the snapshots to search. Each result is printed as SNAP:PATH, which other commands accept.
    """
    from casfs.cli.entry_format import NodeFields, NodeLines, format_state
    from casfs.format.node_types import TYPES_BY_LETTER
    from casfs.query.find import Finder, Query
    from casfs.repository.opening import OpenOptions, open_for_reading

    if pattern is not None:
        pattern = path_argument(pattern).decode("utf-8", "surrogateescape")
    kinds = frozenset([TYPES_BY_LETTER[kind]]) if kind is not None else None
    smallest, largest = size_range if size_range is not None else (0, None)
    newer_than_ns = parse_time(newer, "--newer") if newer is not None else None
    query = Query(
        pattern, ignore_case, kinds, only_flagged, smallest, largest, newer_than_ns=newer_than_ns
    )
    if not query.has_conditions():
        raise UsageError("give a PATTERN, or an option that selects entries, such as --size +1G")
    output = settings.output()
    monitor = CommandMonitor(output, "find")
    with open_for_reading(settings.repository(), OpenOptions(unlock=settings.unlock)) as repository:
        finder = Finder(repository.trees, query, monitor)
        for snapshot_id, snapshot, top, root in _searched(
            output, repository, snaps, settings.snapshot_filter()
        ):
            fields = NodeFields(snapshot).fields
            unproven = not repository.snapshots.provenance.is_from_trusted_writer(snapshot_id)
            long_line = NodeLines(snapshot, root).line
            for path, node in finder.find(root, top):
                if output.as_json:
                    output.emit(
                        "match",
                        snapshot=snapshot_id.hex(),
                        unproven=unproven,
                        **fields(path, node),
                    )
                    continue
                if is_long:
                    output.line(long_line(f"{short_id(snapshot_id)}:".encode() + path, node))
                    continue
                output.line(f"{short_id(snapshot_id)}:{escape_path(path)}")
                state = format_state(node)
                if state:
                    output.line(f"    {state} while it was captured")
        code = report_omitted(output, repository.snapshots.omitted)
    return EXIT_DAMAGED if monitor.problems else code


def _searched(
    output: Output, repository: Repository, snaps: tuple[str, ...], latest_of: SnapshotFilter
) -> list[tuple[SnapshotId, Snapshot, bytes, Node]]:
    """Return the entries to search below, the newest snapshot first."""
    if snaps:
        found = [repository.snapshots.resolve_path(snap, latest_of) for snap in snaps]
        named = {(item[0], item[2]): item for item in found}
        roots = sorted(named.values(), key=lambda item: (item[1].time_ns, item[0]))
    else:
        roots = [
            (snapshot_id, snapshot, b"", snapshot.root)
            for snapshot_id, snapshot in repository.snapshots.iterate()
            if latest_of.accepts(snapshot)
        ]
        found_ids = [item[0] for item in roots]
        warn_of_unproven(output, repository.snapshots.provenance.unproven_of(found_ids))
    return roots[::-1]
