"""The command check: verify snapshots, trees, the index and packs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import click

from casfs.cli.app import EXIT_DAMAGED, EXIT_FAILED
from casfs.cli.options import as_of_option, common_options, progress_options
from casfs.cli.output import Output, format_time, iso_time, json_path, warn_of_unproven
from casfs.cli.param_types import DURATION, PERCENT
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.digest import short_id
from casfs.display import counted, escape_path, format_size, were
from casfs.errors import UsageError

if TYPE_CHECKING:
    from casfs.maintenance.findings import Finding
    from casfs.maintenance.lock_check import LockReport


@click.command(cls=Verb)
@click.option("--read-data", is_flag=True, help="Read every pack and recompute every digest.")
@click.option(
    "--read-data-subset",
    "subset",
    type=PERCENT,
    metavar="P%",
    help="Read this share of the packs.",
)
@click.option(
    "--older-than",
    "older_than_s",
    type=DURATION,
    metavar="DURATION",
    help="Read the packs whose last verification is older, as in 30d.",
)
@click.option(
    "--max-duration",
    "max_duration_s",
    type=DURATION,
    metavar="DURATION",
    help="Read packs until this time has passed, as in 10m; the longest unverified packs come first.",
)
@click.option(
    "--storage",
    "storage_only",
    is_flag=True,
    help="Recompute the digest of every stored object; needs no key and no index.",
)
@as_of_option
@progress_options
@common_options
@click.pass_obj
def check(
    settings: Settings,
    read_data: bool,
    subset: float | None,
    older_than_s: int | None,
    max_duration_s: int | None,
    storage_only: bool,
) -> int:
    """Check every snapshot, tree and index entry, or all data.

    The exit code is 5 if something is damaged.

    casfs records when it verified each pack, also if the check is interrupted: with --older-than the next
    check continues from there.
    """
    from casfs.maintenance.check import Checker
    from casfs.maintenance.lock_check import check_locks
    from casfs.maintenance.scrub import PackSelection
    from casfs.repository.opening import OpenOptions, open_for_reading

    if storage_only:
        if read_data or (subset, older_than_s, max_duration_s) != (None, None, None):
            raise UsageError("--storage reads everything; do not combine it with another selection")
        return _check_storage(settings)
    if subset == 0:
        raise UsageError("--read-data-subset 0% reads nothing; give more than 0%")
    choice = None
    if read_data or (subset, older_than_s, max_duration_s) != (None, None, None):
        choice = PackSelection(subset if subset is not None else 1.0, older_than_s, max_duration_s)
    output = settings.output()
    monitor = settings.monitor("check")
    root = settings.repository()
    with (
        open_for_reading(
            root,
            OpenOptions(unlock=settings.unlock, use_cache=False),
            reader="check",
            may_write_index=True,
        ) as repository,
        monitor,
    ):
        result = Checker(repository, monitor).check(choice)
        locks = check_locks(repository, monitor, repository.clock.now_ns() // 1_000_000_000)
    _print_result(output, result.damage)
    _print_result(output, result.unreadable, "unreadable")
    output.summary(
        f"checked {counted(result.snapshots, 'snapshot')}, {counted(result.trees, 'tree')}, "
        f"{counted(result.files, 'file')}, {counted(result.packs, 'pack')}"
    )
    if result.packs_read:
        output.summary(
            f"read {counted(result.packs_read, 'pack')} with {counted(result.blobs_read, 'blob')}, "
            f"{format_size(result.read_bytes)}"
        )
    if result.packs_left:
        output.summary(f"not read: {counted(result.packs_left, 'pack')}, left for the next check")
    if result.flagged:
        output.summary(
            f"{counted(result.flagged, 'flagged file')}: changed during the capture; "
            "`casfs changed SNAP` lists them"
        )
    warn_of_unproven(output, result.unproven)
    if locks is not None:
        _print_locks(output, locks)
    if choice is None and result.packs:
        output.summary(
            "not read: the data in the packs; `casfs check --read-data` reads and verifies it"
        )
    return _conclude(
        output,
        result,
        snapshots=result.snapshots,
        unproven_ids=[snapshot_id.hex() for snapshot_id in result.unproven],
        trees=result.trees,
        files=result.files,
        flagged=result.flagged,
        packs=result.packs,
        packs_read=result.packs_read,
        packs_left=result.packs_left,
        blobs_read=result.blobs_read,
        read_bytes=result.read_bytes,
    )


def _print_locks(output: Output, report: LockReport) -> None:
    """Print until when each snapshot is protected, and warn of packs that are locked for less long."""
    for snapshot_id, until_s in report.snapshots.items():
        if until_s is not None:
            output.summary(f"snapshot {short_id(snapshot_id)} is locked until {_date(until_s)}")
        output.emit("lock", snapshot=snapshot_id.hex(), locked_until=_iso_date(until_s))
    unlocked = list(report.snapshots.values()).count(None)
    if unlocked:
        output.summary(
            f"{counted(unlocked, 'snapshot')} {'is' if unlocked == 1 else 'are'} not locked"
        )
    for short in report.short:
        until = "is not locked"
        if short.until_s is not None:
            until = f"is locked only until {_date(short.until_s)}"
        output.warn(
            f"{short.pack}, which snapshot {short_id(short.snapshot)} needs, {until}; "
            "the next backup that relies on it locks it again"
        )
        output.emit(
            "short_lock",
            snapshot=short.snapshot.hex(),
            snapshot_locked_until=_iso_date(short.snapshot_until_s),
            pack=short.pack.rpartition("/")[2],
            locked_until=_iso_date(short.until_s),
        )


def _date(time_s: int) -> str:
    return format_time(time_s * 1_000_000_000)


def _iso_date(time_s: int | None) -> str | None:
    return iso_time(time_s * 1_000_000_000) if time_s is not None else None


class _Checked(Protocol):
    """The result of a check, of the whole repository or of its stored objects."""

    damage: list[Finding]
    unreadable: list[Finding]


def _conclude(output: Output, result: _Checked, **counts: object) -> int:
    """Print how the check ended, and the summary with these counts as JSON; return the exit code."""
    damage, unreadable = result.damage, result.unreadable
    _print_conclusion(output, damage)
    if unreadable:
        output.warn(
            f"{counted(len(unreadable), 'object')} could not be checked ({unreadable[0].message}); run casfs "
            "check as the owner of the repository, with an identity for everything that it holds"
        )
    output.emit(
        "summary",
        ok=not damage and not unreadable,
        damage=len(damage),
        unreadable=len(unreadable),
        **counts,
    )
    if damage:
        return EXIT_DAMAGED
    return EXIT_FAILED if unreadable else 0


def _print_result(output: Output, found: list[Finding], kind: str = "damage") -> None:
    for damage in found:
        output.line(_format_finding(damage))
        output.emit(
            kind,
            what=damage.what,
            message=damage.message,
            pack=damage.pack.hex() if damage.pack is not None else None,
            blob=damage.blob.hex() if damage.blob is not None else None,
            snapshot=damage.snapshot.hex() if damage.snapshot is not None else None,
            **(json_path(damage.path) if damage.path is not None else {"path": None}),
            ranges=[list(part) for part in damage.ranges],
        )


def _print_conclusion(output: Output, found: list[Finding]) -> None:
    """Print how much damage was found, and what to do about it."""
    if not found:
        output.summary("no damage was found")
        return
    output.line(f"{counted(len(found), 'problem')} {were(len(found))} found")
    output.line(
        "next: run `casfs backup` of the same sources again, which stores lost data that still exists; "
        "then `casfs repair index` and `casfs repair snapshots --dry-run`"
    )


def _check_storage(settings: Settings) -> int:
    from casfs.maintenance.storage_check import check_storage

    place = settings.repository()
    storage = place.open_storage()
    trust = place.trust_root(storage)
    output = settings.output()
    monitor = settings.monitor("check")
    with monitor:
        result = check_storage(storage, trust, monitor)
    storage.close()
    _print_result(output, result.damage)
    _print_result(output, result.unreadable, "unreadable")
    output.summary(
        f"read {counted(result.objects, 'object')}, {format_size(result.read_bytes)}; not checked: "
        "whether snapshots miss data, which `casfs check` does"
    )
    return _conclude(output, result, objects=result.objects, read_bytes=result.read_bytes)


def _format_finding(damage: Finding) -> str:
    parts = [damage.what]
    if damage.path is not None:
        parts.append(escape_path(damage.path) or "/")
    if damage.snapshot is not None:
        parts.append(f"in snapshot {short_id(damage.snapshot)}")
    if damage.blob is not None:
        parts.append(f"{'' if damage.what == 'blob' else 'blob '}{short_id(damage.blob)}")
    if damage.pack is not None:
        parts.append(f"{'' if damage.what == 'pack' else 'pack '}{damage.pack.hex()}")
    return f"{' '.join(parts)}: {damage.message}"
