"""The command snapshots: list the snapshots of a repository."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from casfs.cli.options import as_of_option, common_options, snapshot_filter_options
from casfs.cli.output import (
    Output,
    format_time,
    iso_time,
    json_path,
    json_paths,
    warn_of_unproven,
)
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.digest import short_id
from casfs.display import escape_path, format_size

if TYPE_CHECKING:
    from casfs.digest import SnapshotId
    from casfs.format.snapshot import Snapshot
    from casfs.repository.repository import Repository

    Found = tuple[SnapshotId, Snapshot]


@click.command(cls=Verb)
@click.option(
    "--latest",
    type=click.IntRange(1),
    metavar="N",
    help="Only the newest N of each group of equal host and paths.",
)
@as_of_option
@snapshot_filter_options
@common_options
@click.pass_obj
def snapshots(
    settings: Settings,
    latest: int | None,
) -> None:
    """List snapshots, the newest last.

    A snapshot must match one of several --host, one of several --tag, and every --path. Of an encrypted
    repository without a key, only times and sizes are listed.
    """
    from casfs.repository.opening import OpenOptions, open_for_reading

    choice = settings.snapshot_filter()
    output = settings.output()
    root = settings.repository()
    with open_for_reading(
        root, OpenOptions(unlock=settings.unlock, allow_no_identity=True)
    ) as repository:
        if repository.lacks_identity and choice.is_empty() and not latest:
            _list_envelopes(output, repository)
            return
        everything = list(repository.snapshots.iterate())
        unproven = set(repository.snapshots.provenance.unproven_of(one for one, _ in everything))
    found = _last_of_each([item for item in everything if choice.accepts(item[1])], latest)
    if output.as_json:
        for snapshot_id, snapshot in found:
            _emit_snapshot(output, snapshot_id, snapshot, snapshot_id in unproven)
    elif found:
        _print_table(output, found)
        warn_of_unproven(output, [item[0] for item in found if item[0] in unproven])
    elif everything:
        output.warn(f"no snapshot matches; the repository has {len(everything)}")
    else:
        output.warn("the repository has no snapshots; casfs backup creates one")


def _list_envelopes(output: Output, repository: Repository) -> None:
    """List the part of each snapshot that can be read without a key."""
    from casfs.errors import CasfsError

    found = []
    for snapshot_id in repository.snapshots.ids():
        try:
            envelope = repository.snapshots.envelope(snapshot_id)
        except CasfsError as error:
            output.warn(str(error))
            continue
        if envelope is not None:
            found.append((snapshot_id, envelope))
    found.sort(key=lambda item: (item[1].time_ns, item[0]))
    rows = []
    for snapshot_id, envelope in found:
        sizes = (format_size(envelope.total_bytes), format_size(envelope.new_stored_bytes))
        rows.append((short_id(snapshot_id), format_time(envelope.time_ns), *sizes))
        output.emit(
            "snapshot",
            id=snapshot_id.hex(),
            time=iso_time(envelope.time_ns),
            bytes=envelope.total_bytes,
            new_bytes=envelope.new_stored_bytes,
            closed=True,
        )
    if rows and not output.as_json:
        output.table(("id", "time", "size", "added"), ("size", "added"), rows)
        output.warn(
            "the repository is encrypted; give --identity or a passphrase to see hosts and paths"
        )


def _last_of_each(found: list[Found], count: int | None) -> list[Found]:
    """Return the last snapshots of each host and its sources; those from the future are not counted."""
    from casfs.repository.snapshot_filter import is_from_future

    if count is None:
        return found
    now_ns = time.time_ns()
    seen: dict[object, int] = {}
    kept = []
    for snapshot_id, snapshot in reversed(found):
        key = snapshot.host, snapshot.paths, snapshot.directory
        is_future = is_from_future(snapshot.time_ns, now_ns)
        seen[key] = seen.get(key, 0) + (not is_future)
        if is_future or seen[key] <= count:
            kept.append((snapshot_id, snapshot))
    return kept[::-1]


def _emit_snapshot(
    output: Output, snapshot_id: SnapshotId, snapshot: Snapshot, unproven: bool
) -> None:
    tree = snapshot.root.tree
    assert tree is not None
    output.emit(
        "snapshot",
        id=snapshot_id.hex(),
        time=iso_time(snapshot.time_ns),
        host=snapshot.host,
        username=snapshot.user,
        **json_paths(snapshot.paths),
        directory=json_path(snapshot.directory)["path"]
        if isinstance(snapshot.directory, bytes)
        else None,
        tags=list(snapshot.tags),
        parent=snapshot.parent.hex() if snapshot.parent is not None else None,
        program=snapshot.program,
        files=snapshot.stats.files,
        dirs=snapshot.stats.directories,
        others=snapshot.stats.others,
        bytes=tree.total_bytes,
        new_bytes=snapshot.stats.new_stored_bytes,
        flagged=tree.flagged,
        unreadable=snapshot.stats.unreadable,
        vanished=snapshot.stats.vanished,
        unproven=unproven,
    )


_HEADS = ("id", "time", "host", "paths", "tags", "files", "size", "added", "flagged")


_NUMBERS = ("files", "size", "added", "flagged")


_TEXTS = {"host": 6, "paths": 12, "tags": 6}


_SPARE = ("files", "added")


def _print_table(output: Output, found: list[Found]) -> None:
    rows = [row for snapshot_id, snapshot in found for row in _rows(snapshot_id, snapshot)]
    output.table(_HEADS, _NUMBERS, rows, _TEXTS, _SPARE)


def _rows(snapshot_id: SnapshotId, snapshot: Snapshot) -> list[tuple[str, ...]]:
    """Return the row of a snapshot, and a row for each further path."""
    tree = snapshot.root.tree
    assert tree is not None
    first, *others = [escape_path(path) for path in snapshot.paths] or [""]
    row = (
        short_id(snapshot_id),
        format_time(snapshot.time_ns),
        escape_path(snapshot.host.encode()),
        first,
        ",".join(escape_path(tag.encode()) for tag in snapshot.tags),
        str(snapshot.stats.files),
        format_size(tree.total_bytes),
        format_size(snapshot.stats.new_stored_bytes),
        str(tree.flagged) if tree.flagged else "",
    )
    return [row, *(("", "", "", other, "", "", "", "", "") for other in others)]
