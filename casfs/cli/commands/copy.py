"""The command copy: copy snapshots into another repository, decrypting and encrypting as each needs."""

from __future__ import annotations

import click

from casfs.cli.app import EXIT_DAMAGED
from casfs.cli.options import common_options, progress_options, snapshot_filter_options
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.digest import short_id
from casfs.display import format_size
from casfs.errors import IntegrityError, UsageError


@click.command(cls=Verb)
@click.argument("snaps", nargs=-1, required=True, metavar="SNAP...")
@click.option(
    "--to",
    "destination",
    required=True,
    metavar="REPOSITORY",
    help="The other repository: a path, a URL or a name from the configuration.",
)
@click.option(
    "--compression",
    "level",
    type=click.IntRange(-7, 22),
    default=3,
    show_default=True,
    metavar="LEVEL",
    help="The zstd compression level in the other repository.",
)
@snapshot_filter_options
@progress_options
@common_options
@click.pass_obj
def copy(settings: Settings, snaps: tuple[str, ...], destination: str, level: int) -> int:
    """Copy snapshots into another repository with its own keys.

    SNAP is an id, the beginning of an id, `latest`, or `all`. A snapshot that the other repository already
    has is skipped. A copy has the time, host, paths and tags of its original. A configured repository is
    opened with its own keys; without any, casfs writes to an encrypted one as a write-only host does.
    """
    from casfs.cli.key_options import KeyOptions
    from casfs.maintenance.copy import SnapshotCopier
    from casfs.repository.opening import OpenOptions, open_for_reading, open_for_writing
    from casfs.repository.place import place_of
    from casfs.storage.url import parse_address

    source = settings.repository()
    address = settings.resolve(destination)
    target = place_of(parse_address(address.url), address.storage_options())
    if str(source) == str(target):
        raise UsageError("--to names the repository itself; name another one")
    keys = KeyOptions()
    if address.named is not None:
        keys.use_named(address.named)
    output = settings.output()
    monitor = settings.monitor("copy")
    damaged = 0
    with (
        open_for_reading(source, OpenOptions(unlock=settings.unlock), reader="copy") as reading,
        open_for_writing(
            target,
            "copy",
            OpenOptions(
                unlock=keys.unlock_given, allow_no_identity=True, level=level, sync=settings.sync
            ),
        ) as writing,
        monitor,
    ):
        store = reading.snapshots
        if "all" in snaps:
            chosen = list(store.iterate())
        else:
            chosen = [store.resolve(snap, settings.snapshot_filter()) for snap in snaps]
        copier = SnapshotCopier(reading, writing, monitor)
        for snapshot_id, snapshot in dict(chosen).items():
            label = short_id(snapshot_id)
            try:
                found = copier.copy(snapshot_id, snapshot)
            except IntegrityError as error:
                damaged += 1
                output.warn(f"snapshot {label} is not copied: {error}; run casfs check")
                output.emit("damage", snapshot=snapshot_id.hex(), message=str(error))
                continue
            if found.was_there:
                output.summary(f"snapshot {label} was there: {short_id(found.new_id)}")
            else:
                stored = format_size(found.stored_bytes)
                output.summary(
                    f"snapshot {label} copied: {short_id(found.new_id)}, {stored} stored"
                )
            output.emit(
                "copied",
                id=found.new_id.hex(),
                original=snapshot_id.hex(),
                was_there=found.was_there,
                new_bytes=found.stored_bytes,
            )
    return EXIT_DAMAGED if damaged else 0
