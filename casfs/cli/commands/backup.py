"""The verb backup."""

from __future__ import annotations

import os
import select
import socket
import sys
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING

import click

from casfs.cli.app import EXIT_CHANGED, EXIT_UNREADABLE, stdout_failed
from casfs.cli.output import format_size, iso_time, json_path, short_id
from casfs.cli.param_types import PATTERN, SIZE, TAGS
from casfs.cli.progress import CommandMonitor
from casfs.cli.settings import Settings, common_options
from casfs.errors import NotFoundError, TrustError, UsageError
from casfs.paths import normalize_source_path
from casfs.patterns import Pattern, read_patterns

if TYPE_CHECKING:
    from casfs.backup.run import BackupResult
    from casfs.crypto.identities import Identities
    from casfs.crypto.opening import Unlock
    from casfs.format.config import RepositoryConfig
    from casfs.storage.base import Storage

_MAX_LIST_BYTES = 64 * 1024 * 1024
"""Of a list of paths; a snapshot's file could not hold that many."""

_PIECE_BYTES = 64 * 1024

_MOST_SECONDS = 9_200_000_000
"""Before and after 1970: a snapshot's time is a signed number of nanoseconds in 64 bits."""


@click.command()
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option(
    "--tag",
    "tags",
    type=TAGS,
    multiple=True,
    metavar="TAG[,TAG...]",
    help="Give the snapshot tags.",
)
@click.option("--host", metavar="NAME", help="The host's name [default: this one's].")
@click.option("--time", "when", metavar="TIME", help="The snapshot's time, ISO 8601 or @SECONDS.")
@click.option(
    "--exclude",
    "excludes",
    multiple=True,
    type=PATTERN,
    metavar="PATTERN",
    help="Leave out what matches (gitignore syntax, from the snapshot's root).",
)
@click.option(
    "--exclude-file",
    "exclude_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Leave out what matches a pattern in a file, as in .gitignore.",
)
@click.option("--exclude-caches", is_flag=True, help="Leave out directories with a CACHEDIR.TAG.")
@click.option(
    "--exclude-if-present",
    multiple=True,
    metavar="NAME",
    help="Leave out what is in directories that hold NAME, except NAME itself.",
)
@click.option("--exclude-larger-than", type=SIZE, metavar="SIZE", help="Leave out larger files.")
@click.option(
    "--one-file-system", "-x", is_flag=True, help="Stay on the file systems of the sources."
)
@click.option(
    "--files-from",
    multiple=True,
    metavar="FILE",
    help="Read paths from a file, - is stdin. Each line is a path, one with # too.",
)
@click.option("-0", "--null", "nul", is_flag=True, help="Paths of --files-from end with NUL.")
@click.option("--stdin", is_flag=True, help="Back up what comes from standard input.")
@click.option("--stdin-name", metavar="NAME", help="Its name in the snapshot [default: stdin].")
@click.option("--dry-run", "-n", is_flag=True, help="Do all but store anything.")
@click.option("--parent", metavar="SNAP", help="Compare with this snapshot.")
@click.option("--no-parent", is_flag=True, help="Read every file.")
@click.option(
    "--attempts",
    type=click.IntRange(1, 100),
    default=3,
    show_default=True,
    help="How often a file that changes is captured; above 1 once more at the end.",
)
@click.option(
    "--patience",
    "patience_s",
    type=click.FloatRange(0, 86_400),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="Time for pauses and further captures of files that change, in all.",
)
@click.option(
    "--freeze",
    type=click.Choice(["auto", "never", "require"]),
    default="auto",
    show_default=True,
    help="Read a clone of a file that changes, where its file system can make one.",
)
@click.option(
    "--reread",
    is_flag=True,
    help="Read unchanged files too, and tell those whose content changed all the same.",
)
@click.option(
    "--compression",
    type=click.IntRange(-7, 22),
    default=3,
    show_default=True,
    metavar="LEVEL",
    help="The zstd level.",
)
@click.option(
    "--spool",
    type=click.Choice(["memory", "disk"]),
    default="disk",
    show_default=True,
    help="Where a pack is put together.",
)
@click.option("--changed-ok", is_flag=True, help="Exit 0 although files changed.")
@click.option(
    "--recipients-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Refuse unless the repository is encrypted to just these recipients.",
)
@common_options
@click.pass_obj
def backup(
    settings: Settings,
    paths: tuple[str, ...],
    tags: tuple[frozenset[str], ...],
    host: str | None,
    when: str | None,
    excludes: tuple[Pattern, ...],
    exclude_files: tuple[Path, ...],
    exclude_caches: bool,
    exclude_if_present: tuple[str, ...],
    exclude_larger_than: int | None,
    one_file_system: bool,
    files_from: tuple[str, ...],
    nul: bool,
    stdin: bool,
    stdin_name: str | None,
    dry_run: bool,
    parent: str | None,
    no_parent: bool,
    attempts: int,
    patience_s: float,
    freeze: str,
    reread: bool,
    compression: int,
    spool: str,
    changed_ok: bool,
    recipients_file: Path | None,
) -> int:
    """Publish a snapshot of files and directories.

    An encrypted repository is written to without any identity; one that is given is used to compare with
    the previous snapshot.

    Exit 3 means that it is published but some sources could not be read, 4 that some files changed
    while they were read, or were found silently changed by --reread.
    """
    from casfs.backup.exclude import Exclusions
    from casfs.backup.reflink import Freeze
    from casfs.backup.run import BackupOptions, run_backup
    from casfs.repository.opening import OpenOptions, open_for_writing

    sources = [os.fsencode(path) for path in paths]
    if sys.stdin is None and (stdin or "-" in files_from):
        raise UsageError("standard input is closed, and nothing can be read from it")
    for name in files_from:
        sources += _read_paths(name, nul)
    if stdin and (sources or "-" in files_from):
        raise UsageError("--stdin does not go with paths")
    if nul and not files_from:
        raise UsageError("-0 goes with --files-from")
    if stdin_name is not None and not stdin:
        raise UsageError("--stdin-name goes with --stdin")
    if not (sources or stdin):
        raise UsageError("name what to back up")
    if any(not source for source in sources):
        raise UsageError("an empty path cannot be backed up")
    if host == "":
        raise UsageError("--host needs a name")
    if parent is not None and no_parent:
        raise UsageError("--parent does not go with --no-parent")
    patterns = list(excludes)
    for path in exclude_files:
        patterns += read_patterns(path)
    options = BackupOptions(
        paths=tuple(sources),
        host=host if host is not None else socket.gethostname(),
        tags=tuple(sorted(frozenset[str]().union(*tags))),
        time_ns=_parse_time(when) if when is not None else None,
        exclusions=Exclusions(
            tuple(patterns),
            exclude_caches,
            tuple(_marker_name(name) for name in exclude_if_present),
            exclude_larger_than,
        ),
        one_file_system=one_file_system,
        parent=parent,
        use_parent=not no_parent,
        attempts=attempts,
        patience_s=patience_s,
        freeze=Freeze(freeze),
        reread=reread,
        dry_run=dry_run,
        spool_in_memory=spool == "memory",
        stdin_name=_stdin_name(stdin_name) if stdin else None,
    )
    monitor = CommandMonitor(settings.output(), "backup", _source_names(sources))
    root = settings.repository_path()
    unlock: Unlock = settings.keys.unlock_given
    recipients_file = recipients_file or settings.recipients_file()
    if recipients_file is not None:
        unlock = _expecting(root, recipients_file, unlock)
    with (
        open_for_writing(
            root,
            "backup",
            OpenOptions(unlock=unlock, allow_locked=True, level=compression, sync=settings.sync),
        ) as repository,
        monitor,
    ):
        result = run_backup(repository, options, monitor)
    code = exit_code(result, changed_ok)
    try:
        _report(settings, result, dry_run)
        sys.stdout.flush()
    except OSError as error:
        # The snapshot is published whether or not anybody hears of it, and the code says so.
        return stdout_failed(error, code)
    return code


def exit_code(result: BackupResult, changed_ok: bool) -> int:
    """Return what a backup that was published ends with; unreadable sources outrank changed files."""
    stats, tree = result.snapshot.stats, result.snapshot.root.tree
    if stats.unreadable:
        return EXIT_UNREADABLE
    changed = stats.silently_changed or (tree is not None and tree.flagged)
    return EXIT_CHANGED if changed and not changed_ok else 0


def _report(settings: Settings, result: BackupResult, dry_run: bool) -> None:
    snapshot, stats = result.snapshot, result.snapshot.stats
    tree = snapshot.root.tree
    assert tree is not None
    output = settings.output()
    output.line(
        f"{stats.files} files in {stats.directories} directories, {format_size(tree.total_bytes)}; "
        f"{stats.unchanged} unchanged; {format_size(stats.new_stored_bytes)} "
        f"{'would be ' if dry_run else ''}stored anew in {stats.seconds:.1f} s"
    )
    if stats.vanished:
        output.line(f"{stats.vanished} vanished before or while they were read")
    if stats.unreadable:
        output.line(f"{stats.unreadable} could not be read")
    if tree.flagged:
        output.line(f"{tree.flagged} changed while they were read and are flagged")
    if stats.silently_changed:
        output.line(f"{stats.silently_changed} changed although size, mtime and ctime did not")
    if result.snapshot_id is not None:
        output.line(f"snapshot {short_id(result.snapshot_id)}")
    else:
        output.line("nothing was stored: this was a dry run")
    output.emit(
        "snapshot",
        id=result.snapshot_id.hex() if result.snapshot_id is not None else None,
        time=iso_time(snapshot.time_ns),
        host=snapshot.host,
        paths=[json_path(path)["path"] for path in snapshot.paths],
        tags=list(snapshot.tags),
        parent=snapshot.parent.hex() if snapshot.parent is not None else None,
        files=stats.files,
        dirs=stats.directories,
        others=stats.others,
        bytes=tree.total_bytes,
        new_bytes=stats.new_stored_bytes,
        new_plain_bytes=stats.new_plain_bytes,
        new_blobs=stats.new_blobs,
        unchanged=stats.unchanged,
        flagged=tree.flagged,
        unreadable=stats.unreadable,
        vanished=stats.vanished,
        silently_changed=stats.silently_changed,
        seconds=stats.seconds,
        dry_run=dry_run,
    )


def _expecting(root: Path, file: Path, unlock: Unlock) -> Unlock:
    """Return what unlocks a repository only if it has just the recipients that a file names."""
    from casfs.cli.commands.key import recipients_in
    from casfs.crypto.key_manager import require_recipients, trust_current_recipients
    from casfs.repository.opening import read_config

    expected = recipients_in(file)
    if read_config(root).encryption is None:
        raise TrustError(f"the repository in {root} is not encrypted; nothing was stored")

    def expect_and_unlock(storage: Storage, config: RepositoryConfig) -> Identities:
        require_recipients(storage, expected)
        trust_current_recipients(root.absolute(), storage, config)
        return unlock(storage, config)

    return expect_and_unlock


def _source_names(sources: list[bytes]) -> Callable[[bytes], bytes]:
    """Return what turns a path of the snapshot into the one in the source."""
    relative = {normalize_source_path(source).split(b"/")[0] for source in sources} - {b""}

    def source_name(path: bytes) -> bytes:
        if path.startswith(b"/") or b"." in relative or path.split(b"/")[0] in relative:
            return path
        return b"/" + path

    return source_name


def _read_paths(name: str, nul: bool) -> list[bytes]:
    """Return the paths in a file, one a line; a carriage return that ends every line is no part of them."""
    where = "on standard input" if name == "-" else f"in {name}"
    try:
        with open(0 if name == "-" else name, "rb", 0, closefd=name != "-") as file:
            data = _read_all(file, _MAX_LIST_BYTES)
    except FileNotFoundError as error:
        raise NotFoundError(f"the file of paths {name} does not exist") from error
    if len(data) > _MAX_LIST_BYTES:
        raise UsageError(f"the paths {where} take more than {_MAX_LIST_BYTES} bytes")
    if nul:
        return [path for path in data.split(b"\0") if path]
    if b"\0" in data:
        raise UsageError(f"the paths {where} hold NUL; add -0 where each path ends with it")
    lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line]
    if all(line.endswith(b"\r") for line in lines):
        lines = [path for line in lines if (path := line.removesuffix(b"\r"))]
    return lines


def _read_all(file: RawIOBase, max_bytes: int) -> bytes:
    """Return what a file holds, and one byte more than `max_bytes` of a longer one.

    A pipe that another process made non-blocking is waited for.
    """
    data = bytearray()
    while len(data) <= max_bytes:
        piece = file.read(min(_PIECE_BYTES, max_bytes + 1 - len(data)))
        if piece is None:
            select.select([file], [], [])
        elif not piece:
            break
        else:
            data += piece
    return bytes(data)


def _marker_name(name: str) -> bytes:
    encoded = os.fsencode(name)
    if b"/" in encoded or encoded in (b"", b".", b".."):
        raise UsageError(f"--exclude-if-present must be a plain file name, not {name!r}")
    return encoded


def _stdin_name(name: str | None) -> bytes:
    encoded = os.fsencode(name if name is not None else "stdin")
    if b"/" in encoded or encoded in (b"", b".", b"..") or len(encoded) > 255:
        raise UsageError(f"--stdin-name must be a plain file name, not {name!r}")
    return encoded


def _parse_time(text: str) -> int:
    """Return a time in nanoseconds, to the last digit that was given and none more."""
    try:
        if text.startswith("@"):
            seconds = Decimal(text[1:])
        else:
            moment = datetime.fromisoformat(text)
            seconds = Decimal(int(moment.replace(microsecond=0).timestamp()))
            seconds += Decimal(moment.microsecond).scaleb(-6)
        if not -_MOST_SECONDS < seconds < _MOST_SECONDS:
            raise UsageError(f"--time {text!r} is not between the years 1678 and 2261")
    except (ValueError, ArithmeticError) as error:
        raise UsageError(f"--time {text!r} is neither ISO 8601 nor @SECONDS") from error
    return int(seconds.scaleb(9))
