"""The verbs mount and umount."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import click

from casfs.cli.param_types import OWNER, SIZE
from casfs.cli.settings import Settings, common_options, unlocked
from casfs.display import escape_path
from casfs.errors import CasfsError


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="[SNAP[:PATH]] MOUNTPOINT")
@click.option("--foreground", "-f", is_flag=True, help="Stay here until it is unmounted.")
@click.option("--allow-other", is_flag=True, help="Let other users in; permissions hold for them.")
@click.option("--owner", type=OWNER, metavar="UID:GID", help="Show everything as theirs.")
@click.option(
    "--cache-size",
    type=SIZE,
    default="64M",
    show_default=True,
    metavar="BYTES",
    help="Memory for decoded data.",
)
@click.option("--deny-changed", is_flag=True, help="Give EIO for files captured while changing.")
@click.option(
    "--no-kernel-cache",
    is_flag=True,
    help="Verify at each read: the kernel keeps no data (slower, and no shared mappings).",
)
@click.option(
    "--log-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where a mount in the background logs [default: the system's log].",
)
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
    """Show a snapshot, or without SNAP all of them, as a file system.

    Returns when the mount is usable; it stays until `casfs umount`.
    """
    if len(names) > 2:
        raise click.UsageError("name one snapshot at most, and one mountpoint")
    serving = server()
    request = serving.MountRequest(
        repository=settings.repository_path(),
        mountpoint=Path(names[-1]),
        snapshot=names[0] if len(names) == 2 else None,
        allow_other=allow_other,
        owner=owner,
        cache_bytes=cache_size,
        deny_changed=deny_changed,
        kernel_cache=not no_kernel_cache,
        log_file=log_file,
        identities=unlocked(settings.repository_path(), settings.unlock),
    )

    def tell(mountpoint: Path) -> None:
        output = settings.output()
        output.line(f"mounted on {escape_path(bytes(mountpoint))}")
        output.emit("mounted", mountpoint=str(mountpoint))
        sys.stdout.flush()

    if foreground:
        serving.mount_here(request, tell)
    else:
        tell(serving.mount_in_background(request))


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
@common_options
@click.pass_obj
def umount(settings: Settings, mountpoint: Path) -> None:
    """Take a mount away."""
    from casfs_mount.mountpoint import unmount

    real = unmount(mountpoint)
    output = settings.output()
    output.line(f"unmounted {escape_path(bytes(real))}")
    output.emit("unmounted", mountpoint=str(real))


def server() -> ModuleType:
    """Return the module that mounts; raises CasfsError where pyfuse3 cannot be loaded."""
    try:
        import casfs_mount.server
    except ModuleNotFoundError as error:
        raise CasfsError(
            f"casfs mount needs pyfuse3, which cannot be loaded here ({error}); everything else works"
        ) from error
    except ImportError as error:
        raise CasfsError(f"casfs mount cannot load pyfuse3: {error}") from error
    return casfs_mount.server
