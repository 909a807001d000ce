"""The command stats: print sizes of the repository or of a snapshot."""

from __future__ import annotations

import click

from casfs.cli.output import format_size
from casfs.cli.settings import Settings, common_options


@click.command()
@click.argument("snap", metavar="[SNAP[:PATH]]", required=False)
@common_options
@click.pass_obj
def stats(settings: Settings, snap: str | None) -> None:
    """Print sizes: of the whole repository, or of what a snapshot holds."""
    from casfs.query.stats import repository_stats, snapshot_stats
    from casfs.repository.repository import Repository

    output = settings.output()
    with Repository.open(settings.repository_path(), unlock=settings.unlock) as repository:
        if snap is not None:
            seen = snapshot_stats(repository, snap)
            output.line(f"entries:    {seen.entries}")
            output.line(f"size:       {format_size(seen.total_bytes)}")
            output.line(f"flagged:    {seen.flagged}")
            output.line(f"blobs:      {seen.blobs}")
            output.line(
                f"stored:     {format_size(seen.stored_bytes)} (without what others share: "
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
            return
        whole = repository_stats(repository)
    output.line(f"snapshots:  {whole.snapshots}")
    output.line(f"packs:      {whole.packs} ({format_size(whole.pack_bytes)})")
    output.line(f"blobs:      {whole.blobs} ({format_size(whole.plain_bytes)} before compression)")
    output.line(f"contents:   {format_size(whole.total_bytes)} in all snapshots")
    output.emit(
        "stats",
        snapshots=whole.snapshots,
        packs=whole.packs,
        pack_bytes=whole.pack_bytes,
        blobs=whole.blobs,
        plain_bytes=whole.plain_bytes,
        bytes=whole.total_bytes,
    )
