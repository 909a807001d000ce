"""The verbs repair index and repair snapshots."""

from __future__ import annotations

import click

from casfs.cli.output import short_id
from casfs.cli.progress import CommandMonitor
from casfs.cli.settings import Settings, common_options


@click.group()
@common_options
def repair() -> None:
    """Mend what is derived, and give up what is lost."""


@repair.command()
@common_options
@click.pass_obj
def index(settings: Settings) -> None:
    """Build the index anew from the packs alone.

    Intact blobs are found even in a pack whose directory is damaged.
    """
    from casfs.maintenance.repair import repair_index
    from casfs.repository.opening import OpenOptions, open_for_maintenance
    from casfs.storage.locks import LockMode

    output = settings.output()
    monitor = CommandMonitor(output, "repair index")
    root = settings.repository_path()
    with (
        open_for_maintenance(
            root,
            "repair index",
            OpenOptions(unlock=settings.unlock, sync=settings.sync),
            mode=LockMode.EXCLUSIVE,
        ) as repository,
        monitor,
    ):
        result = repair_index(repository)
    for pack in result.salvaged:
        output.line(f"pack {pack.hex()}: its directory is damaged; its intact blobs were found")
    for pack in result.unreadable:
        output.line(f"pack {pack.hex()}: it cannot be read, and is left out until it can")
    output.line(f"the index was built from {result.packs} packs and has {result.blobs} blobs")
    output.emit(
        "index",
        packs=result.packs,
        blobs=result.blobs,
        salvaged=[pack.hex() for pack in result.salvaged],
        unreadable=[pack.hex() for pack in result.unreadable],
    )


@repair.command()
@click.option("--read-data", is_flag=True, help="Read every pack first, to know all that is lost.")
@click.option(
    "--dry-run", "-n", is_flag=True, help="Tell what would be dropped, and change nothing."
)
@common_options
@click.pass_obj
def snapshots(settings: Settings, read_data: bool, dry_run: bool) -> None:
    """Drop from snapshots what is lost, and nothing else, naming it.

    A file that lost a part keeps the rest, with zeros for the part, and is flagged. Try first whether a
    new backup of the same sources brings the lost data back.
    """
    from casfs.maintenance.repair import SnapshotRepairer
    from casfs.maintenance.scrub import PackSelection
    from casfs.repository.opening import OpenOptions, open_for_maintenance

    output = settings.output()
    monitor = CommandMonitor(output, "repair snapshots")
    root = settings.repository_path()
    with (
        open_for_maintenance(
            root, "repair snapshots", OpenOptions(unlock=settings.unlock, sync=settings.sync)
        ) as repository,
        monitor,
    ):
        repairer = SnapshotRepairer(repository, monitor, dry_run)
        result = repairer.repair(PackSelection() if read_data else None)
    would = "would be " if dry_run else ""
    for snapshot_id in result.returned:
        output.line(
            f"snapshot {short_id(snapshot_id)} is whole and had another's name; it "
            f"{would or 'was '}given its own"
        )
        output.emit("returned", id=snapshot_id.hex(), dry_run=dry_run)
    for one in result.repaired:
        if one.message:
            output.line(f"snapshot {short_id(one.snapshot_id)} {would}dropped: {one.message}")
        else:
            by = f"replaced by {short_id(one.new_id)}" if one.new_id is not None else "replaced"
            output.line(
                f"snapshot {short_id(one.snapshot_id)} {would}{by}: {one.holed} files flagged, "
                f"{one.dropped} losses dropped"
            )
        output.emit(
            "snapshot",
            id=one.snapshot_id.hex(),
            replaced_by=one.new_id.hex() if one.new_id is not None else None,
            flagged=one.holed,
            dropped=one.dropped,
            message=one.message or None,
            dry_run=dry_run,
        )
    output.line(
        f"{result.intact} snapshots are sound, {len(result.repaired)} {would or 'were '}repaired"
    )
    output.emit("summary", sound=result.intact, repaired=len(result.repaired), dry_run=dry_run)
