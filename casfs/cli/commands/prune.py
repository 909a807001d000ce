"""The command prune, and its result as forget --prune prints it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casfs.cli.options import common_options, progress_options
from casfs.cli.output import Output, format_time, iso_time
from casfs.cli.param_types import DURATION, PERCENT
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.digest import short_id
from casfs.display import counted, format_size

if TYPE_CHECKING:
    from casfs.maintenance.prune_plan import PruneOptions
    from casfs.maintenance.prune_result import PruneResult
    from casfs.repository.repository import Repository


@click.command(cls=Verb)
@click.option(
    "--max-unused",
    "max_unused_share",
    type=PERCENT,
    metavar="P%",
    default="25%",
    show_default=True,
    help="Repack packs with more unused data than this.",
)
@click.option(
    "--margin",
    "margin_s",
    type=DURATION,
    metavar="DURATION",
    help="Keep data this long for mounts and restores that run now (default: a day). Where hosts write "
    "over a network, data stays at least this long after it was found unneeded (default: an hour).",
)
@click.option(
    "--drop-draft",
    "dropped",
    metavar="ID",
    multiple=True,
    help="Drop this draft first, a snapshot that was never published and that is damaged or of no use "
    "(repeatable).",
)
@click.option("--dry-run", "-n", is_flag=True, help="Print what would be freed; free nothing.")
@progress_options
@common_options
@click.pass_obj
def prune(
    settings: Settings,
    max_unused_share: float,
    margin_s: int | None,
    dropped: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Remove data that no snapshot needs.

    It is safe while backups and mounts run.

    Data that a running backup may rely on is left for the next prune.

    Where hosts write over a network, a prune marks the data and does not wait. The first prune that runs an
    hour later or more removes it.
    """
    from casfs.maintenance.prune_plan import PruneOptions

    run_prune(settings, PruneOptions(max_unused_share, margin_s, dry_run), dropped=dropped)


def run_prune(
    settings: Settings,
    options: PruneOptions,
    level: int | None = None,
    dropped: tuple[str, ...] = (),
) -> None:
    """Prune a repository and print the result; `level` is zstd's for what is stored again.

    `dropped` are the ids of drafts that are deleted first.
    """
    from casfs.maintenance.shared_prune import new_pruner
    from casfs.repository.opening import DEFAULT_LEVEL, OpenOptions, open_for_maintenance

    root, output = settings.repository(), settings.output()
    monitor = settings.monitor("prune")
    with (
        open_for_maintenance(
            root,
            "prune" if level is None else "recompress",
            OpenOptions(
                unlock=settings.unlock,
                sync=settings.sync,
                level=DEFAULT_LEVEL if level is None else level,
            ),
        ) as repository,
        monitor,
    ):
        for name in dropped:
            _drop_draft(output, repository, name, options)
        pruner = new_pruner(repository, options, monitor)
        plan = pruner.plan()
        result = pruner.estimate(plan) if options.dry_run else pruner.execute(plan)
    _print_result(output, result, options.dry_run)


def _drop_draft(output: Output, repository: Repository, name: str, options: PruneOptions) -> None:
    from casfs.maintenance.drafts import drop_draft

    draft = drop_draft(repository, name, options.margin_s, options.dry_run)
    if options.dry_run:
        output.line(f"draft {short_id(draft)} would be dropped")
    else:
        output.line(f"draft {short_id(draft)} was dropped; a copy is in damaged/{draft.hex()}")
    output.emit("draft", id=draft.hex(), dry_run=options.dry_run)


def _print_result(output: Output, result: PruneResult, dry_run: bool) -> None:
    would = "would be " if dry_run else ""
    need = "needs" if result.snapshots == 1 else "need"
    output.summary(
        f"{counted(result.snapshots, 'snapshot')} {need} {result.needed_blobs} of "
        f"{counted(result.needed_blobs + result.unneeded_blobs, 'blob')} in "
        f"{counted(result.packs, 'pack')}"
    )
    if result.unproven:
        output.line(
            f"{result.unproven} of these snapshots are unproven; their data is kept until `casfs forget` "
            "removes them by their ids"
        )
    if result.repacked_packs:
        output.summary(
            f"{counted(result.repacked_packs, 'pack')} ({format_size(result.repacked_bytes)}) "
            f"{would}repacked into {format_size(result.new_bytes)}"
        )
    if result.removed_packs:
        output.summary(
            f"{counted(result.removed_packs, 'pack')} {would}removed; "
            f"{format_size(result.freed_bytes)} {would}freed"
        )
    else:
        output.summary(f"nothing {would}freed{_why_nothing(result)}")
    if result.grown_bytes:
        output.summary(
            f"the repository {'would grow' if dry_run else 'grew'} by {format_size(result.grown_bytes)}, "
            "until the packs that were repacked are removed"
        )
    if result.marked_packs:
        output.summary(
            f"{counted(result.marked_packs, 'pack')} ({format_size(result.marked_bytes)}) {would}marked for "
            "removal"
        )
    if result.removable_ns:
        output.summary(
            f"{counted(result.waiting_packs, 'pack')} ({format_size(result.waiting_bytes)}) {would}removed "
            f"by the first prune after {format_time(result.removable_ns)}"
        )
    elif result.waiting_packs:
        output.summary(
            f"{counted(result.waiting_packs, 'pack')} ({format_size(result.waiting_bytes)}) not yet "
            f"removed because of {counted(len(result.waited_for), 'other process', 'other processes')}; "
            "the next prune removes what is left"
        )
    if result.in_flight_packs:
        output.summary(
            f"{counted(result.in_flight_packs, 'pack')} ({format_size(result.in_flight_bytes)}) left alone: "
            "a process that `casfs locks` lists may have stored this; a later prune looks again"
        )
    if result.locked_packs:
        until = format_time(result.locked_until_s * 1_000_000_000)
        output.summary(
            f"{counted(result.locked_packs, 'pack')} ({format_size(result.locked_bytes)}) "
            f"{'stays' if result.locked_packs == 1 else 'stay'} until {until} at the latest, because of "
            "locks; a later prune removes what snapshots do not need then"
        )
    if result.drafts:
        output.line(
            f"{counted(result.drafts, 'draft')} of snapshots that were never published; their data stays"
        )
    if result.dropped_drafts:
        output.line(
            f"{counted(result.dropped_drafts, 'draft')} of these {would}dropped as abandoned; the next prune "
            "finds the data unneeded"
        )
    output.emit(
        "prune",
        dry_run=dry_run,
        snapshots=result.snapshots,
        unproven_snapshots=result.unproven,
        packs=result.packs,
        needed_blobs=result.needed_blobs,
        unneeded_blobs=result.unneeded_blobs,
        repacked_packs=result.repacked_packs,
        repacked_bytes=result.repacked_bytes,
        copied_bytes=result.new_bytes,
        removed_packs=result.removed_packs,
        removed_bytes=result.removed_bytes,
        freed_bytes=result.freed_bytes,
        grown_bytes=result.grown_bytes,
        waiting_packs=result.waiting_packs,
        waiting_bytes=result.waiting_bytes,
        marked_packs=result.marked_packs,
        marked_bytes=result.marked_bytes,
        removable_from=iso_time(result.removable_ns) if result.removable_ns else None,
        in_flight_packs=result.in_flight_packs,
        in_flight_bytes=result.in_flight_bytes,
        drafts=result.drafts,
        dropped_drafts=result.dropped_drafts,
        locked_packs=result.locked_packs,
        locked_bytes=result.locked_bytes,
        locked_until=iso_time(result.locked_until_s * 1_000_000_000)
        if result.locked_until_s
        else None,
    )


def _why_nothing(result: PruneResult) -> str:
    """Return a clause that says why a prune removed no pack."""
    if result.waiting_packs or result.locked_packs or result.in_flight_packs:
        return " yet"
    if result.unneeded_blobs:
        return ": what is unneeded shares packs with needed data (--max-unused)"
    return ": snapshots need everything"
