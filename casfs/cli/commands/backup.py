"""The command backup: publish a snapshot of files and directories."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from casfs import interruption
from casfs.cli.backup_report import exit_code, report_backup
from casfs.cli.options import (
    common_options,
    complete_snapshots,
    pattern_option,
    progress_options,
    tags_option,
    upload_limit_option,
)
from casfs.cli.param_types import SIZE, parse_time
from casfs.cli.path_list import read_path_list
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.errors import TrustError, UsageError
from casfs.paths import normalize_source_path
from casfs.patterns import Pattern, read_patterns

if TYPE_CHECKING:
    from casfs.crypto.identities import Identities
    from casfs.crypto.opening import Unlock
    from casfs.crypto.trust_root import TrustRoot
    from casfs.repository.place import Place
    from casfs.storage.base import Storage


@click.command(cls=Verb)
@click.argument("paths", nargs=-1, metavar="PATH...")
@tags_option("--tag", "tags", "Give the snapshot tags.")
@click.option("--host", metavar="NAME", help="The host's name [default: the name of this host].")
@click.option("--time", "when", metavar="TIME", help="The snapshot's time, ISO 8601 or @SECONDS.")
@pattern_option(
    "--exclude",
    "excludes",
    "Leave out entries that match (gitignore syntax, from the snapshot's root).",
)
@click.option(
    "--exclude-file",
    "exclude_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Leave out entries that match a pattern in this file, as in .gitignore.",
)
@click.option("--exclude-caches", is_flag=True, help="Leave out directories with a CACHEDIR.TAG.")
@click.option(
    "--exclude-if-present",
    multiple=True,
    metavar="NAME",
    help="Leave out the contents of directories that contain NAME, except NAME itself.",
)
@click.option("--exclude-larger-than", type=SIZE, metavar="SIZE", help="Leave out larger files.")
@click.option(
    "--one-file-system", "-x", is_flag=True, help="Stay on the file systems of the sources."
)
@click.option(
    "--files-from",
    multiple=True,
    metavar="FILE",
    help="Read paths from this file, - is stdin. A line that begins with # is a path too.",
)
@click.option("-0", "--null", "nul", is_flag=True, help="The paths in --files-from end with NUL.")
@click.option("--stdin", is_flag=True, help="Back up standard input as one file.")
@click.option(
    "--stdin-from-command",
    is_flag=True,
    help="Run the arguments as a command and back up its output; fail if the command fails.",
)
@click.option(
    "--stdin-name", metavar="NAME", help="The name of that file in the snapshot [default: stdin]."
)
@click.option("--dry-run", "-n", is_flag=True, help="Do everything except write.")
@click.option(
    "--parent",
    metavar="SNAP",
    shell_complete=complete_snapshots,
    help="Compare with this snapshot to find unchanged files.",
)
@click.option("--no-parent", is_flag=True, help="Read every file.")
@click.option(
    "--attempts",
    type=click.IntRange(1, 100),
    default=3,
    show_default=True,
    help="Capture a file that changes up to N times; above 1, once more at the end of the backup.",
)
@click.option(
    "--patience",
    "patience_s",
    type=click.FloatRange(0, 86_400),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="Limit the total time for pauses and repeated captures of files that change.",
)
@click.option(
    "--max-holes",
    "max_hole_bytes",
    type=SIZE,
    default="4T",
    show_default=True,
    metavar="SIZE",
    help="Limit the holes in the sparse files of each user, except root and yourself; files beyond the "
    "limit are left out.",
)
@click.option(
    "--mount-timeout",
    "mount_timeout_s",
    type=click.FloatRange(0, 86_400, min_open=True),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="Give up a FUSE or network mount in a source that answers nothing for so long; the rest of it is "
    "left out.",
)
@click.option(
    "--freeze",
    type=click.Choice(["auto", "never", "require"]),
    default="auto",
    show_default=True,
    help="Read a clone of a file that changes, where the file system supports clones.",
)
@click.option(
    "--reread",
    is_flag=True,
    help="Read unchanged files too, and report those whose content changed silently.",
)
@click.option(
    "--compression",
    type=click.IntRange(-7, 22),
    default=3,
    show_default=True,
    metavar="LEVEL",
    help="The zstd compression level.",
)
@click.option(
    "--spool",
    type=click.Choice(["memory", "disk"]),
    default="disk",
    show_default=True,
    help="Where to assemble packs.",
)
@click.option("--changed-ok", is_flag=True, help="Exit 0 even if files changed.")
@click.option(
    "--recipients-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Refuse unless the repository is encrypted to exactly these recipients.",
)
@upload_limit_option
@progress_options
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
    stdin_from_command: bool,
    stdin_name: str | None,
    dry_run: bool,
    parent: str | None,
    no_parent: bool,
    attempts: int,
    patience_s: float,
    max_hole_bytes: int,
    mount_timeout_s: float,
    freeze: str,
    reread: bool,
    compression: int,
    spool: str,
    changed_ok: bool,
    recipients_file: Path | None,
) -> int:
    """Publish a snapshot of files and directories.

    A backup to an encrypted repository needs no identity. With an identity, casfs compares the files with
    the previous snapshot.

    Exit code 3: the snapshot is published, but some sources could not be read, or it could not be locked.
    Exit code 4: some files changed while they were read, or --reread found silent changes. Exit code 5: the
    snapshot is published, but a pack of another machine, or of a lost index, lacked data, which are stored
    again.
    """
    from casfs.backup.exclude import Exclusions
    from casfs.backup.reflink import Freeze
    from casfs.backup.run import BackupOptions, run_backup
    from casfs.repository.opening import OpenOptions, open_for_writing

    if stdin_from_command:
        if stdin or files_from:
            raise UsageError("--stdin-from-command excludes --stdin and --files-from")
        if not paths:
            raise UsageError("--stdin-from-command needs a command, as in -- pg_dump mydb")
    command = paths if stdin_from_command else ()
    sources = [] if stdin_from_command else [os.fsencode(path) for path in paths]
    if sys.stdin is None and (stdin or "-" in files_from):
        raise UsageError("standard input is closed; open it or give paths")
    for name in files_from:
        sources += read_path_list(name, nul)
    if stdin and (sources or "-" in files_from):
        raise UsageError("--stdin and paths exclude each other; give one of them")
    if nul and not files_from:
        raise UsageError("-0 needs --files-from")
    is_stream = stdin or stdin_from_command
    if stdin_name is not None and not is_stream:
        raise UsageError("--stdin-name needs --stdin or --stdin-from-command")
    if not (sources or is_stream):
        raise UsageError("give at least one path to back up")
    if any(not source for source in sources):
        raise UsageError("an empty path cannot be backed up")
    if host == "":
        raise UsageError("--host needs a name")
    if parent is not None and no_parent:
        raise UsageError("--parent and --no-parent exclude each other; give one of them")
    patterns = list(excludes)
    for path in exclude_files:
        patterns += read_patterns(path)
    options = BackupOptions(
        paths=tuple(sources),
        host=host if host is not None else socket.gethostname(),
        tags=tuple(sorted(frozenset[str]().union(*tags))),
        time_ns=parse_time(when, "--time") if when is not None else None,
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
        max_hole_bytes=max_hole_bytes,
        mount_timeout_s=mount_timeout_s,
        freeze=Freeze(freeze),
        reread=reread,
        dry_run=dry_run,
        spool_in_memory=spool == "memory",
        stdin_name=_stdin_name(stdin_name) if is_stream else None,
        stdin_command=command,
    )
    interruption.end_stuck_process()
    monitor = settings.monitor("backup", _source_names(sources))
    root = settings.repository()
    unlock: Unlock = settings.keys.unlock_given
    recipients_file = recipients_file or settings.recipients_file()
    if recipients_file is not None:
        unlock = _require_recipients(root, recipients_file, unlock)
    with (
        open_for_writing(
            root,
            "backup",
            OpenOptions(
                unlock=unlock, allow_no_identity=True, level=compression, sync=settings.sync
            ),
        ) as repository,
        monitor,
    ):
        result = run_backup(repository, options, monitor)
    report_backup(settings.output(), result, dry_run)
    return exit_code(result, changed_ok)


def _require_recipients(place: Place, file: Path, unlock: Unlock) -> Unlock:
    """Return a function that unlocks a repository only if its recipients are those in a file."""
    from casfs.cli.commands.key import recipients_in
    from casfs.crypto.key_manager import require_recipients, trust_current_recipients
    from casfs.repository.place import read_config

    expected = recipients_in(file)
    if read_config(place).encryption is None:
        raise TrustError(f"the repository in {place} is not encrypted; nothing was stored")

    def check_and_unlock(storage: Storage, trust: TrustRoot) -> Identities:
        require_recipients(trust.recipients(storage), expected)
        trust_current_recipients(str(place), storage, trust)
        return unlock(storage, trust)

    return check_and_unlock


def _source_names(sources: list[bytes]) -> Callable[[bytes], bytes]:
    """Return a function from a path in the snapshot to the path of its source."""
    relative = {normalize_source_path(source).split(b"/")[0] for source in sources} - {b""}

    def source_name(path: bytes) -> bytes:
        if path.startswith(b"/") or b"." in relative or path.split(b"/")[0] in relative:
            return path
        return b"/" + path

    return source_name


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
