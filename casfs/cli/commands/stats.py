"""The command stats: print sizes of the repository or of a snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casfs.cli.options import common_options, complete_snapshots, snapshot_filter_options
from casfs.cli.output import Output, format_time, iso_time, report_omitted
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.display import format_size
from casfs.errors import UsageError

if TYPE_CHECKING:
    from casfs.storage.counting import RequestCounter


@click.command(cls=Verb)
@click.argument("snap", metavar="[SNAP[:PATH]]", required=False, shell_complete=complete_snapshots)
@click.option(
    "--storage",
    "storage_only",
    is_flag=True,
    help="Only the packs, and when they were last verified; needs no key.",
)
@click.option(
    "--requests",
    is_flag=True,
    help="Print how many requests this command made to a remote repository too.",
)
@snapshot_filter_options
@common_options
@click.pass_obj
def stats(settings: Settings, snap: str | None, storage_only: bool, requests: bool) -> int:
    """Print the sizes of the repository or of a snapshot.

    With --json every command on a remote repository prints its requests.
    """
    from casfs.repository.place import RemotePlace

    place = settings.repository()
    if requests and not isinstance(place, RemotePlace):
        raise UsageError(f"--requests is for a remote repository; {place} is a local folder")
    code = _print_sizes(settings, snap, storage_only)
    if requests and isinstance(place, RemotePlace):
        _print_requests(settings.output(), place.counter)
    return code


def _print_requests(output: Output, counter: RequestCounter) -> None:
    rows = []
    for kind, found in sorted(counter.totals().items()):
        sizes = format_size(found.sent_bytes), format_size(found.received_bytes)
        rows.append((str(kind), str(found.requests), *sizes))
    heads = ("request", "number", "sent", "received")
    output.table(heads, heads[1:], rows)


def _print_sizes(settings: Settings, snap: str | None, storage_only: bool) -> int:
    """Print sizes, and return the exit code: not 0 where snapshots could not be read."""
    from casfs.query.stats import repository_stats, snapshot_stats
    from casfs.repository.opening import OpenOptions, open_for_reading

    if storage_only:
        if snap is not None:
            raise UsageError("--storage counts all packs; give no snapshot")
        _print_packs(settings)
        return 0
    output = settings.output()
    with open_for_reading(settings.repository(), OpenOptions(unlock=settings.unlock)) as repository:
        if snap is not None:
            seen = snapshot_stats(repository, snap, settings.snapshot_filter())
            output.line(f"entries:    {seen.entries}")
            output.line(f"size:       {format_size(seen.total_bytes)}")
            output.line(f"flagged:    {seen.flagged}")
            output.line(f"blobs:      {seen.blobs}")
            output.line(
                f"stored:     {format_size(seen.stored_bytes)} (not shared with others: "
                f"{format_size(seen.unique_stored_bytes)})"
            )
            output.emit(
                "stats",
                snapshot=seen.snapshot_id.hex(),
                entries=seen.entries,
                bytes=seen.total_bytes,
                flagged=seen.flagged,
                blobs=seen.blobs,
                stored_bytes=seen.stored_bytes,
                unique_stored_bytes=seen.unique_stored_bytes,
            )
            return report_omitted(output, repository.snapshots.omitted)
        whole = repository_stats(repository)
    unproven = f" ({whole.unproven} unproven)" if whole.unproven else ""
    output.line(f"snapshots:  {whole.snapshots}{unproven}")
    output.line(f"packs:      {whole.packs} ({format_size(whole.pack_bytes)})")
    output.line(f"blobs:      {whole.blobs} ({format_size(whole.plain_bytes)} before compression)")
    output.line(f"contents:   {format_size(whole.total_bytes)} in all snapshots")
    output.emit(
        "stats",
        snapshots=whole.snapshots,
        unproven_snapshots=whole.unproven,
        packs=whole.packs,
        pack_bytes=whole.pack_bytes,
        blobs=whole.blobs,
        plain_bytes=whole.plain_bytes,
        bytes=whole.total_bytes,
    )
    return report_omitted(output, repository.snapshots.omitted)


def _print_packs(settings: Settings) -> None:
    from casfs.query.stats import pack_stats
    from casfs.repository.opening import OpenOptions, open_for_reading

    with open_for_reading(
        settings.repository(),
        OpenOptions(unlock=settings.keys.unlock_given, allow_no_identity=True),
    ) as repository:
        seen = pack_stats(repository)
    oldest_ns = seen.oldest_verification_ns
    output = settings.output()
    output.line(f"packs:      {seen.packs} ({format_size(seen.pack_bytes)})")
    output.line(f"unverified: {seen.unverified_packs}")
    if oldest_ns is not None:
        output.line(f"oldest:     verified or written {format_time(oldest_ns)}")
    output.emit(
        "stats",
        packs=seen.packs,
        pack_bytes=seen.pack_bytes,
        unverified_packs=seen.unverified_packs,
        oldest_verification=iso_time(oldest_ns) if oldest_ns is not None else None,
    )
