"""The commands mount and umount."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import click

from casfs.cli.key_options import unlock_repository
from casfs.cli.options import (
    as_of_option,
    common_options,
    complete_snapshots,
    output_options,
    snapshot_filter_options,
)
from casfs.cli.output import json_path
from casfs.cli.param_types import OWNER, SIZE
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.display import escape_path
from casfs.errors import CasfsError


@click.command(cls=Verb)
@click.argument(
    "names",
    nargs=-1,
    required=True,
    metavar="[SNAP[:PATH]] MOUNTPOINT",
    shell_complete=complete_snapshots,
)
@click.option(
    "--foreground", "-f", is_flag=True, help="Stay in the foreground until it is unmounted."
)
@click.option(
    "--allow-other", is_flag=True, help="Let other users read it, as far as permissions allow."
)
@click.option("--owner", type=OWNER, metavar="UID:GID", help="Show every entry with this owner.")
@click.option(
    "--cache-size",
    type=SIZE,
    default="24M",
    show_default=True,
    metavar="BYTES",
    help="Memory for verified data.",
)
@click.option(
    "--deny-changed", is_flag=True, help="Return EIO for files that changed during the capture."
)
@click.option(
    "--no-kernel-cache",
    is_flag=True,
    help="Verify data at each read; the kernel keeps none (slower, no shared mappings).",
)
@click.option(
    "--log-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the log of a background mount here [default: syslog].",
)
@as_of_option
@snapshot_filter_options
@common_options
@click.pass_obj
def mount(
    settings: Settings,
    names: tuple[str, ...],
    foreground: bool,
    allow_other: bool,
    owner: tuple[int, int] | None,
    cache_size: int,
    deny_changed: bool,
    no_kernel_cache: bool,
    log_file: Path | None,
) -> None:
    """Mount a snapshot, or all snapshots, as a file system.

    The command returns when the mount is usable. The mount stays until `casfs umount`.
    """
    if len(names) > 2:
        raise click.UsageError("give at most one snapshot and one mountpoint")
    if len(names) == 1 and not settings.snapshot_filter().is_empty():
        raise click.UsageError("--host, --tag and --path narrow latest; name it as the snapshot")
    serving = server()
    place = settings.repository()
    request = serving.MountRequest(
        repository=place,
        mountpoint=Path(names[-1]),
        snapshot=names[0] if len(names) == 2 else None,
        latest_of=settings.snapshot_filter(),
        allow_other=allow_other,
        owner=owner,
        cache_bytes=cache_size,
        deny_changed=deny_changed,
        kernel_cache=not no_kernel_cache,
        log_file=log_file,
        identities=unlock_repository(place, settings.unlock),
    )

    hides_entries = _has_entries(Path(names[-1]))

    def report(mountpoint: Path) -> None:
        output = settings.output()
        if hides_entries:
            output.warn(
                f"{escape_path(bytes(mountpoint))} is not empty; the mount hides its entries until "
                "`casfs umount`"
            )
        output.line(f"mounted on {escape_path(bytes(mountpoint))}")
        output.emit("mounted", **json_path(bytes(mountpoint), "mountpoint"))
        sys.stdout.flush()

    if foreground:
        serving.mount_here(request, report)
    else:
        report(serving.mount_in_background(request))


def _has_entries(mountpoint: Path) -> bool:
    """Return whether a mount will hide entries of a folder; look into no mount, which may hang."""
    from casfs_mount.mountpoint import mounted_at, real_path

    if mounted_at(real_path(mountpoint)) is not None:
        return False
    try:
        with os.scandir(mountpoint) as entries:
            return next(entries, None) is not None
    except OSError:
        return False  # the mount itself reports it


@click.command(cls=Verb)
@click.argument("mountpoint", type=click.Path(path_type=Path))
@output_options
@click.pass_obj
def umount(settings: Settings, mountpoint: Path) -> None:
    """Unmount."""
    from casfs_mount.mountpoint import unmount

    real = unmount(mountpoint)
    output = settings.output()
    output.line(f"unmounted {escape_path(bytes(real))}")
    output.emit("unmounted", **json_path(bytes(real), "mountpoint"))


def server() -> ModuleType:
    """Return the module casfs_mount.server; raise CasfsError if pyfuse3 cannot be loaded."""
    try:
        import casfs_mount.server
    except ModuleNotFoundError as error:
        raise CasfsError(
            f"casfs mount needs pyfuse3, which is not installed ({error}). Install it with "
            "`pip install 'casfs[mount]'`; on Debian and Ubuntu that needs gcc, pkg-config, python3-dev and "
            "libfuse3-dev. All other commands work without it"
        ) from error
    except ImportError as error:
        raise CasfsError(f"casfs mount cannot load pyfuse3: {error}") from error
    return casfs_mount.server
