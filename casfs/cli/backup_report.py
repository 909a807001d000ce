"""The report of a backup: its summary, its JSON line and its exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from casfs.cli.app import EXIT_CHANGED, EXIT_DAMAGED, EXIT_UNREADABLE
from casfs.cli.output import Output, format_time, iso_time, json_paths
from casfs.digest import short_id
from casfs.display import counted, format_size
from casfs.errors import CasfsError

if TYPE_CHECKING:
    from casfs.backup.run import BackupResult


def exit_code(result: BackupResult, changed_ok: bool) -> int:
    """Return the exit code of a published backup; damage outranks unreadable sources, these changed files."""
    if result.false_packs:
        return EXIT_DAMAGED
    stats, tree = result.snapshot.stats, result.snapshot.root.tree
    if stats.unreadable or _protection_error(result) is not None:
        return EXIT_UNREADABLE
    changed = stats.silently_changed or (tree is not None and tree.flagged)
    return EXIT_CHANGED if changed and not changed_ok else 0


def report_backup(output: Output, result: BackupResult, dry_run: bool) -> None:
    """Print the counts of a backup, and the line of its snapshot as JSON."""
    snapshot, stats = result.snapshot, result.snapshot.stats
    tree = snapshot.root.tree
    assert tree is not None
    output.summary(
        f"{counted(stats.files, 'file')} ({result.new} new, {result.modified} modified, "
        f"{stats.unchanged} unchanged) in "
        f"{counted(stats.directories, 'directory', 'directories')}, {format_size(tree.total_bytes)}"
    )
    output.summary(
        f"{format_size(stats.new_stored_bytes)} {'would be ' if dry_run else ''}added in "
        f"{stats.seconds:.1f} s"
    )
    if stats.vanished:
        output.summary(
            f"{counted(stats.vanished, 'entry', 'entries')} vanished before or during the read"
        )
    if stats.unreadable:
        output.summary(f"{counted(stats.unreadable, 'entry', 'entries')} could not be read")
    if tree.flagged:
        output.summary(
            f"{counted(tree.flagged, 'file')} changed during the read; flagged as changed"
        )
    if stats.silently_changed:
        output.summary(
            f"{counted(stats.silently_changed, 'file')} changed although size, mtime and ctime did not"
        )
    if result.false_packs:
        output.summary(
            f"{counted(result.false_packs, 'pack')} that this machine had not verified lacked data which the "
            "backup needs; it is stored again; run `casfs check --read-data`"
        )
    if result.abandoned_bytes:
        output.summary(
            f"up to {format_size(result.abandoned_bytes)} of what was stored belongs to earlier attempts "
            "at files that changed; `casfs prune` frees it"
        )
    if result.snapshot_id is not None:
        output.summary(f"snapshot {short_id(result.snapshot_id)}")
        _report_protection(output, result)
    else:
        output.summary("nothing was stored: this was a dry run")
    output.emit(
        "snapshot",
        id=result.snapshot_id.hex() if result.snapshot_id is not None else None,
        time=iso_time(snapshot.time_ns),
        host=snapshot.host,
        **json_paths(snapshot.paths),
        tags=list(snapshot.tags),
        parent=snapshot.parent.hex() if snapshot.parent is not None else None,
        files=stats.files,
        dirs=stats.directories,
        others=stats.others,
        bytes=tree.total_bytes,
        new_bytes=stats.new_stored_bytes,
        new_plain_bytes=stats.new_plain_bytes,
        new_blobs=stats.new_blobs,
        new=result.new,
        modified=result.modified,
        unchanged=stats.unchanged,
        flagged=tree.flagged,
        unreadable=stats.unreadable,
        vanished=stats.vanished,
        silently_changed=stats.silently_changed,
        abandoned_bytes=result.abandoned_bytes,
        false_packs=result.false_packs,
        seconds=stats.seconds,
        dry_run=dry_run,
        locked_until=_locked_until(result),
        not_locked=result.protection.not_locked if result.protection is not None else 0,
    )


def _protection_error(result: BackupResult) -> CasfsError | None:
    return result.protection.error if result.protection is not None else None


def _locked_until(result: BackupResult) -> str | None:
    """Return until when the snapshot and all that it needs are locked, None where something is not."""
    if result.protection is None or result.protection.error is not None:
        return None
    return iso_time(result.protection.until_s * 1_000_000_000)


def _report_protection(output: Output, result: BackupResult) -> None:
    protection = result.protection
    if protection is None:
        return
    if protection.error is None:
        until = format_time(protection.until_s * 1_000_000_000)
        output.summary(f"locked until {until}: no credential can remove it before")
        return
    output.warn(
        f"the snapshot is not protected: {counted(protection.not_locked, 'object')} that it needs could not "
        f"be locked: {protection.error}"
    )
