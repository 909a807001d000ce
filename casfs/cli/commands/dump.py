"""The command dump: write a file, or a directory as a tar stream."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, BinaryIO

import click

from casfs.cli.options import (
    as_of_option,
    common_options,
    complete_snapshots,
    progress_options,
    snapshot_filter_options,
)
from casfs.cli.output import json_path
from casfs.cli.progress import CommandMonitor
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.display import escape_path
from casfs.errors import CasfsError, UsageError

if TYPE_CHECKING:
    from casfs.format.tree import Node
    from casfs.repository.repository import Repository
    from casfs.restore.tar import TarStats


@click.command(cls=Verb)
@click.argument("snap", metavar="SNAP:PATH", shell_complete=complete_snapshots)
@click.option("--output", "-o", "target", metavar="FILE", help="Write to FILE instead of stdout.")
@as_of_option
@snapshot_filter_options
@progress_options
@common_options
@click.pass_obj
def dump(settings: Settings, snap: str, target: str | None) -> None:
    """Write a file, or a directory as a tar stream, to stdout.

    With --output it goes to a file. Every byte is verified before it is written. The output stops at the
    first damage (exit code 5).
    """
    from casfs.format.node_types import NODE_TYPES
    from casfs.format.tree import NodeType
    from casfs.monitor import Unit
    from casfs.repository.opening import OpenOptions, open_for_reading

    output = settings.output()
    monitor = settings.monitor("dump")
    with (
        open_for_reading(
            settings.repository(), OpenOptions(unlock=settings.unlock), reader="dump"
        ) as repository,
        ExitStack() as stack,
    ):
        snapshot_id, snapshot, path, node = repository.snapshots.resolve_path(
            snap, settings.snapshot_filter()
        )
        kind = NodeType(node.kind)
        if kind not in (NodeType.FILE, NodeType.DIRECTORY):
            raise CasfsError(
                f"{escape_path(path)} is neither a file nor a directory but a {NODE_TYPES[kind].word}; "
                "it has no content to dump"
            )
        file = _open(target, node, output.as_json, stack)
        if target is not None:
            stack.enter_context(monitor)
            tree = node.tree
            monitor.progress.begin(
                "",
                Unit.ENTRIES,
                total_items=tree.nodes if tree is not None else 1,
                total_bytes=tree.total_bytes if tree is not None else node.size,
            )
        if node.tree is None:
            stats = _dump_file(repository, node, path, file, monitor)
        else:
            from casfs.restore.tar import TarWriter

            writer = TarWriter(repository, snapshot, file.write, monitor)
            writer.add_below(node, path)
            stats = writer.finish()
        file.flush()
    output.emit(
        "summary",
        snapshot=snapshot_id.hex(),
        **json_path(path),
        kind=NODE_TYPES[kind].word,
        output=target,
        files=stats.files,
        dirs=stats.directories,
        others=stats.others,
        bytes=stats.content_bytes,
        left_out=stats.left_out,
        flagged=stats.flagged,
    )


def _open(target: str | None, node: Node, as_json: bool, stack: ExitStack) -> BinaryIO:
    if target is not None:
        return stack.enter_context(open(target, "wb"))
    if as_json:
        raise UsageError("--json needs --output FILE for the content")
    if node.tree is not None and _is_terminal():
        raise UsageError("a tar stream cannot go to a terminal; give --output FILE or use a pipe")
    return sys.stdout.buffer


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _dump_file(
    repository: Repository, node: Node, path: bytes, file: BinaryIO, monitor: CommandMonitor
) -> TarStats:
    from casfs.monitor import Problem, ProblemKind
    from casfs.repository.prefetch import Prefetcher
    from casfs.restore.tar import TarStats, file_bytes
    from casfs.trees.reader import is_flagged

    stats = TarStats(files=1, content_bytes=node.size)
    if is_flagged(node):
        stats.flagged = 1
        message = "it changed while it was captured; it is written as it was captured"
        monitor.problem(Problem(ProblemKind.CHANGED, path, message))
    monitor.progress.path = path
    with Prefetcher(repository, path, node) as ahead:
        for data in file_bytes(node, path, ahead.read):
            file.write(data)
            monitor.progress.read_bytes(len(data))
    monitor.progress.finish_file(node.size)
    monitor.progress.items = 1
    return stats
