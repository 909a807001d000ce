"""The commands repair index and repair snapshots."""

from __future__ import annotations

import click

from casfs.cli.options import common_options, progress_options
from casfs.cli.settings import Settings
from casfs.cli.verbs import SuggestingGroup
from casfs.digest import short_id
from casfs.display import counted


@click.group(cls=SuggestingGroup)
@progress_options
@common_options
def repair() -> None:
    """Rebuild the index, or drop lost data from snapshots."""


@repair.command()
@progress_options
@common_options
@click.pass_obj
def index(settings: Settings) -> None:
    """Rebuild the index from the packs alone.

    Intact blobs are found even in a pack whose directory is damaged.
    """
    from casfs.maintenance.repair import repair_index
    from casfs.repository.opening import OpenOptions, open_for_maintenance
    from casfs.storage.locks import LockMode

    output = settings.output()
    monitor = settings.monitor("repair index")
    root = settings.repository()
    with (
        open_for_maintenance(
            root,
            "repair index",
            OpenOptions(unlock=settings.unlock, sync=settings.sync, use_cache=False),
            mode=LockMode.EXCLUSIVE,
        ) as repository,
        monitor,
    ):
        result = repair_index(repository, monitor)
    for pack in result.salvaged:
        output.line(f"pack {pack.hex()}: its directory is damaged; its intact blobs were found")
    for pack in result.unreadable:
        output.line(f"pack {pack.hex()}: it cannot be read; run this again when it can")
    output.summary(
        f"the index was built from {counted(result.packs, 'pack')} and has "
        f"{counted(result.blobs, 'blob')}"
    )
    output.emit(
        "index",
        packs=result.packs,
        blobs=result.blobs,
        salvaged_packs=[pack.hex() for pack in result.salvaged],
        unreadable_packs=[pack.hex() for pack in result.unreadable],
    )


@repair.command()
@click.option("--read-data", is_flag=True, help="Read every pack first, to find all lost data.")
@click.option("--dry-run", "-n", is_flag=True, help="Print what would be dropped; change nothing.")
@progress_options
@common_options
@click.pass_obj
def snapshots(settings: Settings, read_data: bool, dry_run: bool) -> None:
    """Drop lost data from snapshots, and only that; print each loss.

    A file that lost a part keeps the rest, with zeros for the lost part, and is flagged. Run a new backup
    of the same sources first: it may bring the lost data back.
    """
    from casfs.maintenance.repair import SnapshotRepairer
    from casfs.maintenance.scrub import PackSelection
    from casfs.repository.opening import OpenOptions, open_for_maintenance

    output = settings.output()
    monitor = settings.monitor("repair snapshots")
    root = settings.repository()
    with (
        open_for_maintenance(
            root,
            "repair snapshots",
            OpenOptions(unlock=settings.unlock, sync=settings.sync, use_cache=False),
        ) as repository,
        monitor,
    ):
        repairer = SnapshotRepairer(repository, monitor, dry_run)
        result = repairer.repair(PackSelection() if read_data else None)
    would = "would be " if dry_run else ""
    for snapshot_id in result.returned:
        output.line(
            f"snapshot {short_id(snapshot_id)} is intact, but its file had the name of another; it "
            f"{would or 'was '}renamed back"
        )
        output.emit("returned", id=snapshot_id.hex(), dry_run=dry_run)
    for snapshot in result.repaired:
        if snapshot.message:
            output.line(
                f"snapshot {short_id(snapshot.snapshot_id)} {would}dropped: {snapshot.message}"
            )
        else:
            by = (
                f"replaced by {short_id(snapshot.new_id)}"
                if snapshot.new_id is not None
                else "replaced"
            )
            output.line(
                f"snapshot {short_id(snapshot.snapshot_id)} {would}{by}: "
                f"{counted(snapshot.holed, 'file')} flagged, "
                f"{counted(snapshot.dropped, 'loss', 'losses')} dropped"
            )
        output.emit(
            "snapshot",
            id=snapshot.snapshot_id.hex(),
            replaced_by=snapshot.new_id.hex() if snapshot.new_id is not None else None,
            flagged=snapshot.holed,
            dropped=snapshot.dropped,
            message=snapshot.message or None,
            dry_run=dry_run,
        )
    output.summary(
        f"{counted(result.intact, 'intact snapshot')}, {len(result.repaired)} {would}repaired"
    )
    output.emit("summary", intact=result.intact, repaired=len(result.repaired), dry_run=dry_run)
