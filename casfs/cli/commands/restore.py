"""The command restore: write a snapshot, or a part of it, into a folder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from casfs.cli.app import EXIT_DAMAGED, EXIT_FAILED
from casfs.cli.options import (
    as_of_option,
    common_options,
    complete_folders,
    complete_snapshots,
    download_limit_option,
    pattern_option,
    progress_options,
    snapshot_filter_options,
)
from casfs.cli.output import json_path
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.digest import short_id
from casfs.display import counted, escape_path, format_size
from casfs.errors import RefusedError, UsageError
from casfs.patterns import Pattern

if TYPE_CHECKING:
    from casfs.repository.place import Place


@click.command(cls=Verb)
@click.argument("snap", metavar="SNAP[:PATH]", shell_complete=complete_snapshots)
@click.option(
    "--target",
    "-t",
    required=True,
    shell_complete=complete_folders,
    metavar="DIR",
    help="Restore into this folder; it is created if missing.",
)
@pattern_option(
    "--include",
    "includes",
    "Restore only what matches (gitignore syntax, from the snapshot's root).",
)
@pattern_option("--exclude", "excludes", "Leave out what matches; stronger than --include.")
@click.option(
    "--overwrite",
    type=click.Choice(["always", "if-changed", "never"]),
    default="always",
    show_default=True,
    help="When to replace existing entries.",
)
@click.option("--delete", is_flag=True, help="Delete entries that the snapshot does not have.")
@click.option(
    "--verify", is_flag=True, help="Read the written files back and compare their digests."
)
@click.option("--salvage", is_flag=True, help="Write damaged files too, with zeros for lost data.")
@click.option("--dry-run", "-n", is_flag=True, help="Print what would be done; read no file.")
@as_of_option
@snapshot_filter_options
@download_limit_option
@progress_options
@common_options
@click.pass_obj
def restore(
    settings: Settings,
    snap: str,
    target: str,
    includes: tuple[Pattern, ...],
    excludes: tuple[Pattern, ...],
    overwrite: str,
    delete: bool,
    verify: bool,
    salvage: bool,
    dry_run: bool,
) -> int:
    """Write a snapshot, or a part of it, into a folder.

    The entries of a directory go directly into the folder. Exit code 5 means that data was damaged.
    """
    from casfs.monitor import Unit
    from casfs.repository.opening import OpenOptions, open_for_reading
    from casfs.restore.entry_writer import Overwrite
    from casfs.restore.restorer import RestoreOptions, Restorer

    if not target:
        raise UsageError("--target needs a folder")
    options = RestoreOptions(
        include=includes,
        exclude=excludes,
        overwrite=Overwrite(overwrite),
        delete=delete,
        verify=verify,
        salvage=salvage,
        dry_run=dry_run,
    )
    output = settings.output()

    def report_deleted(path: bytes) -> None:
        output.line(f"{'would delete' if dry_run else 'deleted'} {escape_path(path)}")
        output.emit("deleted", **json_path(path), dry_run=dry_run)

    if os.path.exists(target) and not os.path.isdir(target):
        raise RefusedError(f"--target {target} is not a folder; name a folder")
    _refuse_repository(settings.repository(), Path(target), delete)
    with open_for_reading(
        settings.repository(), OpenOptions(unlock=settings.unlock), reader="restore"
    ) as repository:
        snapshot_id, snapshot, path, node = repository.snapshots.resolve_path(
            snap, settings.snapshot_filter()
        )
        # The root has metadata of its own only if `.` or `/` was the source.
        with_root = bool(path) or snapshot.paths in ((b".",), (b"/",))
        monitor = settings.monitor("restore")
        if not (includes or excludes):
            tree = node.tree
            monitor.progress.begin(
                "",
                Unit.ENTRIES,
                total_items=tree.nodes if tree is not None else 1,
                total_bytes=tree.total_bytes if tree is not None else node.size,
            )
        with monitor:
            options = replace(options, sources=snapshot.paths)
            restorer = Restorer(repository, options, monitor, on_deleted=report_deleted)
            result = restorer.restore(path, node, os.fsencode(target), with_root)
    would = "would be " if dry_run else ""
    output.summary(
        f"{would}restored from {short_id(snapshot_id)}: {counted(result.files, 'file')}, "
        f"{counted(result.directories, 'directory', 'directories')}, "
        f"{counted(result.others, 'other')}, "
        f"{format_size(result.restored_bytes)}"
    )
    left = "would be left" if dry_run else "left"
    for count, what in (
        (result.skipped, f"{left} as it was" if result.skipped == 1 else f"{left} as they were"),
        (result.deleted, f"{would}deleted"),
        (result.verified, "read back and verified"),
        (result.flagged, "captured while changing"),
        (result.damaged, "damaged"),
        (result.failed, "not restored"),
    ):
        if count:
            output.summary(f"{counted(count, 'entry', 'entries')} {what}")
    output.emit(
        "summary",
        snapshot=snapshot_id.hex(),
        **json_path(os.fsencode(target), "target"),
        files=result.files,
        dirs=result.directories,
        others=result.others,
        bytes=result.restored_bytes,
        skipped=result.skipped,
        deleted=result.deleted,
        verified=result.verified,
        flagged=result.flagged,
        damaged=result.damaged,
        failed=result.failed,
        dry_run=dry_run,
    )
    if result.damaged:
        return EXIT_DAMAGED
    return EXIT_FAILED if result.failed else 0


def _refuse_repository(place: Place, target: Path, delete: bool) -> None:
    """Raise RefusedError if the restore would write or delete the repository's own files."""
    from casfs.repository.place import RemotePlace

    if isinstance(place, RemotePlace):
        return
    root = place.root
    resolved_root, resolved_target = root.resolve(), target.resolve()
    if resolved_target.is_relative_to(resolved_root):
        raise RefusedError(f"{target} is inside the repository {root}; name another folder")
    if delete and resolved_root.is_relative_to(resolved_target):
        raise RefusedError(
            f"the repository {root} is inside {target}, and --delete could delete it; "
            "name another folder"
        )
