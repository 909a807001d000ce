"""The command mirror: copy every object of the repository to another place, without any key."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from casfs.cli.app import EXIT_DAMAGED
from casfs.cli.options import as_of_option, common_options, progress_options
from casfs.cli.param_types import DURATION
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.display import counted, format_size
from casfs.errors import RefusedError, StorageError

if TYPE_CHECKING:
    from casfs.repository.place import LocalPlace, Place


@click.command(cls=Verb)
@click.argument("destination", metavar="DEST")
@click.option(
    "--delete",
    is_flag=True,
    help="Delete from DEST what the repository has lacked for the margin, snapshots of DEST's own too.",
)
@click.option(
    "--margin",
    "margin_s",
    type=DURATION,
    metavar="DURATION",
    default="7d",
    show_default=True,
    help="With --delete: how long DEST keeps what the repository no longer has.",
)
@as_of_option
@progress_options
@common_options
@click.pass_obj
def mirror(settings: Settings, destination: str, delete: bool, margin_s: int) -> int:
    """Copy the repository as it is to another place.

    The place is a path, a URL or a name from the configuration.

    No key is needed. Run it again to continue, or to copy what is new. Every object is verified on its way;
    a damaged object is reported and not copied. DEST is a repository like any other: restore from it with
    `casfs -r DEST restore`.
    """
    from casfs.maintenance.mirror import Mirror
    from casfs.repository.place import LocalPlace, place_of
    from casfs.storage.locks import LockMode
    from casfs.storage.url import parse_address

    source = settings.repository()
    address = settings.resolve(destination)
    target = place_of(parse_address(address.url), address.storage_options())
    output = settings.output()
    monitor = settings.monitor("mirror")
    with ExitStack() as stack:
        reading = source.open_storage()
        stack.callback(reading.close)
        trust = source.trust_root(reading)
        config = trust.config
        writing = target.open_storage(sync=settings.sync)
        stack.callback(writing.close)
        host = None if config.encryption is None else "a machine"
        if isinstance(source, LocalPlace):
            # A prune of the source keeps for this lock what the mirror may still read.
            stack.enter_context(source.locks(config).acquire("mirror", LockMode.READER, host))
        if isinstance(target, LocalPlace):
            _make_folder(source, target)
            stack.enter_context(target.locks(config).acquire("mirror", LockMode.MAINTENANCE, host))
        stack.enter_context(monitor)
        result = Mirror(reading, writing, monitor, config=trust.data).run(delete, margin_s)
    for finding in result.damage:
        output.warn(f"{finding.message}; it is not copied")
        output.emit("damage", object=finding.what, message=finding.message)
    output.summary(
        f"{counted(result.copied, 'object')} copied, {format_size(result.copied_bytes)}; "
        f"already there: {result.present}"
    )
    if delete:
        output.summary(f"deleted: {result.deleted}; waiting for the margin: {result.pending}")
    output.emit(
        "mirror",
        copied=result.copied,
        copied_bytes=result.copied_bytes,
        present=result.present,
        deleted=result.deleted,
        pending=result.pending,
        damage=len(result.damage),
    )
    return EXIT_DAMAGED if result.damage else 0


def _make_folder(source: Place, target: LocalPlace) -> None:
    """Make the destination's folder; raise RefusedError or StorageError where that cannot be.

    A folder with other contents and no repository is refused, as `init` refuses it.
    """
    from casfs.format.config import CONFIG_NAME
    from casfs.repository.creation import FOLDERS
    from casfs.repository.place import LocalPlace

    if isinstance(source, LocalPlace):
        here, there = source.root.resolve(), target.root.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise RefusedError(f"{there} and the repository in {here} overlap; name another place")
    try:
        target.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        names = set(os.listdir(target.root))
    except FileExistsError:
        raise RefusedError(f"{target.root} is not a folder; name a folder or a URL") from None
    except OSError as error:
        raise StorageError("make the folder", str(target.root), error) from error
    # A mirror that was interrupted before it copied the configuration left folders of a repository at most.
    if CONFIG_NAME not in names and not names.issubset(FOLDERS):
        raise RefusedError(
            f"{target.root} is not empty and has no repository; name a new or empty folder"
        )
