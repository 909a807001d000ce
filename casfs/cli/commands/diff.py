"""The command diff: print the differences between two snapshots."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from casfs.cli.app import EXIT_DAMAGED
from casfs.cli.options import (
    as_of_option,
    common_options,
    complete_snapshots,
    snapshot_filter_options,
)
from casfs.cli.output import Output, json_path
from casfs.cli.progress import CommandMonitor
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.display import escape_path, format_size

if TYPE_CHECKING:
    from casfs.cli.entry_format import NodeFields
    from casfs.format.tree import Node
    from casfs.query.diff import Change

_MARKS = {"added": "+", "removed": "-", "modified": "M", "metadata": "U", "type": "T"}


@dataclass(slots=True)
class _Summary:
    """The totals of a comparison; sizes are bytes of regular files."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_MARKS, 0))
    added_bytes: int = 0
    removed_bytes: int = 0
    modified_bytes: int = 0
    flagged: int = 0


@click.command(cls=Verb)
@click.argument("before", metavar="SNAP[:PATH]", shell_complete=complete_snapshots)
@click.argument("after", metavar="SNAP[:PATH]", shell_complete=complete_snapshots)
@as_of_option
@snapshot_filter_options
@common_options
@click.pass_obj
def diff(settings: Settings, before: str, after: str) -> int:
    """Print what changed from one snapshot, or part, to another.

    The marks: + added, - removed, M content changed, U metadata changed, T type changed. Paths are
    relative to the two sides of the comparison; `.` is the compared entry itself. Inode numbers and ctimes
    are ignored.
    """
    from casfs.cli.entry_format import NodeFields
    from casfs.query.diff import Differ, ancestor_dirs
    from casfs.repository.opening import OpenOptions, open_for_reading

    output = settings.output()
    monitor = CommandMonitor(output, "diff")
    summary = _Summary()
    with open_for_reading(settings.repository(), OpenOptions(unlock=settings.unlock)) as repository:
        latest_of = settings.snapshot_filter()
        old_id, old, old_path, old_node = repository.snapshots.resolve_path(before, latest_of)
        new_id, new, new_path, new_node = repository.snapshots.resolve_path(after, latest_of)
        ancestors = ancestor_dirs(old.paths, old_path) | ancestor_dirs(new.paths, new_path)
        differ = Differ(repository.trees, monitor, ancestors)
        sides = NodeFields(old), NodeFields(new)
        for change in differ.changes(old_node, new_node):
            _add(summary, change)
            _print(output, change) if not output.as_json else _emit(output, change, *sides)
    counts = summary.counts
    output.line(_totals(summary))
    if summary.flagged:
        output.line(f"{summary.flagged} of them were captured while they changed")
    output.emit(
        "summary",
        before_snapshot=old_id.hex(),
        after_snapshot=new_id.hex(),
        added=counts["added"],
        removed=counts["removed"],
        modified=counts["modified"],
        metadata=counts["metadata"],
        retyped=counts["type"],
        added_bytes=summary.added_bytes,
        removed_bytes=summary.removed_bytes,
        modified_bytes=summary.modified_bytes,
        flagged=summary.flagged,
        damaged=monitor.problems,
    )
    return EXIT_DAMAGED if monitor.problems else 0


def _totals(summary: _Summary) -> str:
    """Return the numbers of the differences, without those that are zero."""
    counts = summary.counts
    texts = (
        ("added", f"added ({format_size(summary.added_bytes)})"),
        ("removed", f"removed ({format_size(summary.removed_bytes)})"),
        ("modified", f"modified ({format_size(summary.modified_bytes)})"),
        ("metadata", "with changed metadata"),
        ("type", "with a changed type"),
    )
    found = [f"{counts[kind]} {text}" for kind, text in texts if counts[kind]]
    return ", ".join(found) or "no differences found"


def _add(summary: _Summary, change: Change) -> None:
    summary.counts[change.kind] += 1
    before, after = _file_bytes(change.before), _file_bytes(change.after)
    if change.kind == "modified":
        summary.modified_bytes += after
    elif change.kind != "metadata":
        summary.added_bytes += after
        summary.removed_bytes += before
    summary.flagged += bool(_flagged_sides(change))


def _file_bytes(node: Node | None) -> int:
    from casfs.format.tree import NodeType

    return node.size if node is not None and node.kind == NodeType.FILE else 0


def _flagged_sides(change: Change) -> list[str]:
    from casfs.trees.reader import is_flagged

    sides = (("before", change.before), ("after", change.after))
    return [side for side, node in sides if node is not None and is_flagged(node)]


def _print(output: Output, change: Change) -> None:
    slash = "/" if change.kind in ("added", "removed") and _is_directory(change) else ""
    output.line(f"{_MARKS[change.kind]}  {escape_path(change.path) or '.'}{slash}")
    for side in _flagged_sides(change):
        output.line(f"      the file {side} was captured while it changed")


def _is_directory(change: Change) -> bool:
    node = change.after if change.after is not None else change.before
    return node is not None and node.tree is not None


def _emit(output: Output, change: Change, before: NodeFields, after: NodeFields) -> None:
    output.emit(
        "change",
        **json_path(change.path),
        change=change.kind.value,
        fields=list(change.fields),
        flagged_sides=_flagged_sides(change),
        before=before.attributes(change.before) if change.before is not None else None,
        after=after.attributes(change.after) if change.after is not None else None,
    )
