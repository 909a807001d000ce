"""The command log: list the versions of a path across snapshots."""

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
from casfs.cli.output import Output, format_time, iso_time, warn_of_unproven
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.digest import short_id
from casfs.display import escape_path, format_size
from casfs.errors import IntegrityError, NotFoundError

if TYPE_CHECKING:
    from casfs.digest import SnapshotId
    from casfs.query.history import Version


@click.command(cls=Verb)
@click.argument("snap", metavar="SNAP:PATH", shell_complete=complete_snapshots)
@click.option(
    "--all-hosts", is_flag=True, help="Search the snapshots of all hosts, not only SNAP's."
)
@as_of_option
@snapshot_filter_options
@common_options
@click.pass_obj
def log(settings: Settings, snap: str, all_hosts: bool) -> int:
    """List the versions of a path in the snapshots of a host.

    The host is that of SNAP; the newest version is the last.

    A file has the same version in two snapshots if its content and the state of its capture are equal; a
    directory, if everything below it is equal, times and owners included. The column `snapshot` is the
    first snapshot with that version, which other commands accept as SNAP; `count` is the number of snapshots
    with it.
    """
    from casfs.paths import parse_snapshot_path
    from casfs.query.history import path_history
    from casfs.repository.opening import OpenOptions, open_for_reading

    output = settings.output()
    name, _, text = snap.partition(":")
    path = parse_snapshot_path(text)
    damaged = 0

    def report_damage(snapshot_id: SnapshotId, error: IntegrityError) -> None:
        nonlocal damaged
        damaged += 1
        output.warn(f"snapshot {short_id(snapshot_id)} cannot be searched: {error}")

    with open_for_reading(settings.repository(), OpenOptions(unlock=settings.unlock)) as repository:
        _, named = repository.snapshots.resolve(name, settings.snapshot_filter())
        found = [
            (snapshot_id, snapshot)
            for snapshot_id, snapshot in repository.snapshots.iterate()
            if all_hosts or snapshot.host == named.host
        ]
        found_ids = [snapshot_id for snapshot_id, _ in found]
        warn_of_unproven(output, repository.snapshots.provenance.unproven_of(found_ids))
        versions = path_history(repository.trees, found, path, report_damage)
    if not versions and not damaged:
        raise NotFoundError(
            f"no snapshot has {escape_path(path) or '/'}; {len(found)} were searched"
        )
    if output.as_json:
        for version in versions:
            _emit(output, path, version)
    else:
        output.table(_HEADS, _NUMBERS, map(_row, versions), _TEXTS)
    return EXIT_DAMAGED if damaged else 0


def _emit(output: Output, path: bytes, version: Version) -> None:
    from casfs.cli.entry_format import NodeFields

    (first_id, first), (last_id, last) = version.snapshots[0], version.snapshots[-1]
    tree = version.node.tree
    fields = NodeFields(first).fields(path, version.node)
    output.emit(
        "version",
        **fields,
        tree=tree.digest.hex() if tree is not None else None,
        first=first_id.hex(),
        first_time=iso_time(first.time_ns),
        last=last_id.hex(),
        last_time=iso_time(last.time_ns),
        snapshot_ids=[snapshot_id.hex() for snapshot_id, _ in version.snapshots],
        hosts=sorted({snapshot.host for _, snapshot in version.snapshots}),
    )


_HEADS = ("snapshot", "first", "last", "count", "size", "modified", "digest", "captured")
_NUMBERS = ("count", "size")
_TEXTS = {"first": 10, "last": 10, "modified": 10}


def _row(version: Version) -> tuple[str, ...]:
    from casfs.cli.entry_format import format_state, total_bytes
    from casfs.format.tree import captured_digest

    node = version.node
    (first_id, first), (_, last) = version.snapshots[0], version.snapshots[-1]
    digest = node.tree.digest if node.tree is not None else captured_digest(node)
    return (
        short_id(first_id),
        format_time(first.time_ns),
        format_time(last.time_ns),
        str(len(version.snapshots)),
        format_size(total_bytes(node)),
        format_time(node.mtime_ns),
        short_id(digest) if digest is not None else "",
        format_state(node) or "",
    )
