"""The verbs that list: snapshots, ls, find, changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casfs.cli.app import EXIT_DAMAGED, Settings, common_options
from casfs.cli.output import (
    Output,
    iso_time,
    json_path,
    local_time,
    path_argument,
    shown,
    shown_id,
    shown_size,
)
from casfs.cli.progress import CommandMonitor
from casfs.errors import UsageError

if TYPE_CHECKING:
    from casfs.digest import SnapshotId
    from casfs.format.snapshot import Snapshot
    from casfs.format.tree import Node
    from casfs.repository.repository import Repository

    Found = tuple[SnapshotId, Snapshot]


@click.command()
@click.option("--host", "hosts", multiple=True, metavar="NAME", help="Only of this host.")
@click.option(
    "--tag", "tags", multiple=True, metavar="TAG[,TAG...]", help="Only with all of these tags."
)
@click.option("--path", "paths", multiple=True, metavar="PATH", help="Only with this path.")
@click.option(
    "--latest",
    type=click.IntRange(1),
    metavar="N",
    help="Only the last N of each host and its paths.",
)
@common_options
@click.pass_obj
def snapshots(
    settings: Settings,
    hosts: tuple[str, ...],
    tags: tuple[str, ...],
    paths: tuple[str, ...],
    latest: int | None,
) -> None:
    """List the snapshots, the newest last.

    Of several --host or --tag one has to fit, of several --path every one. Where the repository is
    encrypted and nothing is given that opens it, their times and sizes are listed.
    """
    from casfs.repository.repository import Repository

    output = settings.output()
    root = settings.repository_path()
    with Repository.open(root, unlock=settings.unlock, closed_ok=True) as repository:
        if repository.is_closed and not (hosts or tags or paths or latest):
            _list_closed(output, repository)
            return
        everything = list(repository.snapshots())
        unproven = {one for one, _ in everything if not repository.is_proven(one)}
    found = _last_of_each(_selected(everything, hosts, tags, paths), latest)
    if output.as_json:
        for snapshot_id, snapshot in found:
            _emit_snapshot(output, snapshot_id, snapshot, snapshot_id in unproven)
    elif found:
        _print_table(output, found)
        for snapshot_id in [one for one, _ in found if one in unproven]:
            output.warn(
                f"{shown_id(snapshot_id)} is unproven: it may come from whoever holds the storage"
            )
    elif everything:
        output.warn(f"none of the {len(everything)} snapshots fits")
    else:
        output.warn("the repository has no snapshots yet; casfs backup makes one")


def _list_closed(output: Output, repository: Repository) -> None:
    """List what an encrypted repository tells of its snapshots to anybody."""
    from casfs.errors import CasfsError

    found = []
    for snapshot_id in repository.snapshot_ids():
        try:
            envelope = repository.envelope(snapshot_id)
        except CasfsError as error:
            output.warn(str(error))
            continue
        if envelope is not None:
            found.append((snapshot_id, envelope))
    found.sort(key=lambda item: (item[1].time_ns, item[0]))
    rows = []
    for snapshot_id, envelope in found:
        sizes = (shown_size(envelope.total_bytes), shown_size(envelope.new_stored_bytes))
        rows.append((shown_id(snapshot_id), local_time(envelope.time_ns), *sizes))
        output.emit(
            "snapshot",
            id=snapshot_id.hex(),
            time=iso_time(envelope.time_ns),
            bytes=envelope.total_bytes,
            new_bytes=envelope.new_stored_bytes,
            closed=True,
        )
    if rows and not output.as_json:
        output.table(("id", "time", "size", "stored"), ("size", "stored"), rows)
        output.warn(
            "the repository is encrypted, and nothing was given that opens it: give --identity"
        )


def _selected(
    found: list[Found], hosts: tuple[str, ...], tags: tuple[str, ...], paths: tuple[str, ...]
) -> list[Found]:
    from casfs.backup.sources import keep_path

    wanted_tags = [set(text.split(",")) for text in tags]
    wanted_paths = {keep_path(path_argument(path)) for path in paths}
    return [
        (snapshot_id, snapshot)
        for snapshot_id, snapshot in found
        if (not hosts or snapshot.host in hosts)
        and (not wanted_tags or any(wanted <= set(snapshot.tags) for wanted in wanted_tags))
        and wanted_paths <= set(snapshot.paths)
    ]


def _last_of_each(found: list[Found], count: int | None) -> list[Found]:
    if count is None:
        return found
    seen: dict[tuple[str, tuple[bytes, ...]], int] = {}
    kept = []
    for snapshot_id, snapshot in reversed(found):
        key = snapshot.host, snapshot.paths
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= count:
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
        user=snapshot.user,
        paths=[json_path(path)["path"] for path in snapshot.paths],
        tags=list(snapshot.tags),
        parent=snapshot.parent.hex() if snapshot.parent is not None else None,
        program=snapshot.program,
        files=snapshot.stats.files,
        dirs=snapshot.stats.directories,
        others=snapshot.stats.others,
        bytes=tree.total_bytes,
        flagged=tree.flagged,
        unreadable=snapshot.stats.unreadable,
        vanished=snapshot.stats.vanished,
        unproven=unproven,
    )


_HEADS = ("id", "time", "host", "paths", "tags", "files", "size", "flagged")
_NUMBERS = ("files", "size", "flagged")


def _print_table(output: Output, found: list[Found]) -> None:
    rows = [row for snapshot_id, snapshot in found for row in _rows(snapshot_id, snapshot)]
    output.table(_HEADS, _NUMBERS, rows)


def _rows(snapshot_id: SnapshotId, snapshot: Snapshot) -> list[tuple[str, ...]]:
    """Return a snapshot's row, and one more for each further path."""
    tree = snapshot.root.tree
    assert tree is not None
    first, *others = [shown(path) for path in snapshot.paths] or [""]
    row = (
        shown_id(snapshot_id),
        local_time(snapshot.time_ns),
        shown(snapshot.host.encode()),
        first,
        ",".join(shown(tag.encode()) for tag in snapshot.tags),
        str(snapshot.stats.files),
        shown_size(tree.total_bytes),
        str(tree.flagged) if tree.flagged else "",
    )
    return [row, *(("", "", "", other, "", "", "", "") for other in others)]


@click.command()
@click.argument("snap", metavar="SNAP[:PATH]")
@click.option("--recursive", "-R", is_flag=True, help="List all that is below PATH.")
@common_options
@click.pass_obj
def ls(settings: Settings, snap: str, recursive: bool) -> int:
    """List all of a snapshot, or the entries of the directory PATH in it (`:/` is the top).

    A directory's size is that of all files below it. Files are marked that were written to while
    they were captured: `changed` (a mixture may have been captured) or `appended` (their beginning).
    """
    from casfs.cli.entry_format import NodeFields, NodeLines
    from casfs.query.find import Finder, Query
    from casfs.repository.repository import Repository

    output = settings.output()
    monitor = CommandMonitor(output, "ls")
    with Repository.open(settings.repository_path(), unlock=settings.unlock) as repository:
        _, snapshot, path, node = repository.resolve_path(snap)
        fields = NodeFields(snapshot).fields
        line = NodeLines(snapshot, node).line
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


@click.command()
@click.argument("pattern", required=False)
@click.option(
    "--snapshot",
    "snaps",
    multiple=True,
    metavar="SNAP[:PATH]",
    help="Look in this snapshot [default: in all].",
)
@click.option("--changed", "only_flagged", is_flag=True, help="Only files flagged as changed.")
@click.option(
    "--type",
    "kind",
    type=click.Choice(list("fdlpscb")),
    help="Only files, directories, symlinks, pipes, sockets, character or block devices.",
)
@click.option("--ignore-case", "-i", is_flag=True, help="Take capital and small letters as equal.")
@common_options
@click.pass_obj
def find(
    settings: Settings,
    pattern: str | None,
    snaps: tuple[str, ...],
    only_flagged: bool,
    kind: str | None,
    ignore_case: bool,
) -> int:
    """Look for names in snapshots, the newest first.

    PATTERN is a shell glob for the name, or for the whole path where it has a slash; its * matches
    slashes too. With --changed it may be left out. What is found can be given to other verbs as it is
    printed, SNAP:PATH.
    """
    from casfs.cli.entry_format import NodeFields, shown_state
    from casfs.query.find import KIND_LETTERS, Finder, Query
    from casfs.repository.repository import Repository

    if pattern is None and not only_flagged:
        raise UsageError("say what to look for: a PATTERN, or --changed")
    if pattern is not None:
        pattern = path_argument(pattern).decode("utf-8", "surrogateescape")
    kinds = frozenset([KIND_LETTERS[kind]]) if kind is not None else None
    query = Query(pattern, ignore_case, kinds, only_flagged)
    output = settings.output()
    monitor = CommandMonitor(output, "find")
    with Repository.open(settings.repository_path(), unlock=settings.unlock) as repository:
        finder = Finder(repository.trees, query, monitor)
        for snapshot_id, snapshot, top, root in _searched(repository, snaps):
            fields = NodeFields(snapshot).fields
            for path, node in finder.find(root, top):
                if output.as_json:
                    output.emit("match", snapshot=snapshot_id.hex(), **fields(path, node))
                    continue
                output.line(f"{shown_id(snapshot_id)}:{shown(path)}")
                state = shown_state(node)
                if state:
                    output.line(f"    {state} while it was captured")
    return EXIT_DAMAGED if monitor.problems else 0


def _searched(
    repository: Repository, snaps: tuple[str, ...]
) -> list[tuple[SnapshotId, Snapshot, bytes, Node]]:
    """Return the places to look in, the newest snapshot first."""
    if snaps:
        named = {(found[0], found[2]): found for found in map(repository.resolve_path, snaps)}
        places = sorted(named.values(), key=lambda found: (found[1].time_ns, found[0]))
    else:
        places = [
            (snapshot_id, snapshot, b"", snapshot.root)
            for snapshot_id, snapshot in repository.snapshots()
        ]
    return places[::-1]


@click.command()
@click.argument("snap", metavar="SNAP[:PATH]")
@common_options
@click.pass_obj
def changed(settings: Settings, snap: str) -> None:
    """List the files that changed while they were captured.

    Told are the reason, the number of attempts, and the BLAKE3 digests (as of b3sum) of what was
    captured and of what was seen when the file was read again.
    """
    from casfs.cli.entry_format import NodeFields, shown_reason
    from casfs.format.tree import captured_digest
    from casfs.repository.repository import Repository
    from casfs.trees.flagged import flagged_files

    output = settings.output()
    count = 0
    with Repository.open(settings.repository_path(), unlock=settings.unlock) as repository:
        snapshot_id, snapshot, path, node = repository.resolve_path(snap)
        fields = NodeFields(snapshot).fields
        for below, file in flagged_files(repository.trees, node, path):
            count += 1
            if output.as_json:
                output.emit("changed", snapshot=snapshot_id.hex(), **fields(below, file))
                continue
            capture = file.extra.capture if file.extra is not None else None
            attempts = capture.attempts if capture is not None else 0
            observed = capture.observed if capture is not None else None
            output.line(
                f"{shown_reason(file):<10}  {attempts} attempt{'' if attempts == 1 else 's':<1}  "
                f"captured {shown_id(captured_digest(file) or b'')}  "
                f"observed {shown_id(observed) if observed is not None else 'nothing':<12}  "
                f"{shown(below)}"
            )
    if not count and not output.as_json:
        output.warn(f"nothing in {shown(path_argument(snap))} changed while it was captured")
