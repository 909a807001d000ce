"""The command forget: remove snapshots by rules or by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from casfs.cli.options import (
    common_options,
    complete_snapshots,
    keep_option,
    progress_options,
    snapshot_filter_options,
    tags_option,
)
from casfs.cli.output import (
    Output,
    format_time,
    iso_time,
    json_paths,
    report_omitted,
    warn_of_unproven,
)
from casfs.cli.param_types import SPAN
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.digest import short_id
from casfs.display import counted, escape_path
from casfs.errors import UsageError

if TYPE_CHECKING:
    from casfs.maintenance.forget import Candidate, ForgetPlan, Grouping, GroupKey
    from casfs.maintenance.retention import CalendarSpan, Policy


@click.command(cls=Verb)
@click.argument("snaps", nargs=-1, metavar="[SNAP]...", shell_complete=complete_snapshots)
@keep_option("last", "l", "Keep the newest N snapshots.")
@keep_option("hourly", "H", "Keep the newest of each of N hours.")
@keep_option("daily", "d", "Keep the newest of each of N days.")
@keep_option("weekly", "w", "Keep the newest of each of N weeks.")
@keep_option("monthly", "m", "Keep the newest of each of N months.")
@keep_option("yearly", "y", "Keep the newest of each of N years.")
@click.option(
    "--keep-within",
    type=SPAN,
    metavar="SPAN",
    help="Keep all within this time before the newest, as in 1y6m or 30d.",
)
@tags_option("--keep-tag", "keep_tags", "Keep all that have all of these tags; repeatable.")
@snapshot_filter_options
@click.option(
    "--group-by",
    default="host,paths",
    show_default=True,
    metavar="WHAT",
    help="Apply the rules to each group of equal host, paths or tags; none makes one group.",
)
@click.option(
    "--dry-run", "-n", is_flag=True, help="Print what would be removed, and why the rest is kept."
)
@click.option("--prune", "then_prune", is_flag=True, help="Run prune afterwards to free the space.")
@click.option(
    "--unsafe-allow-remove-all",
    "allow_all",
    is_flag=True,
    help="Allow the removal of the last snapshot.",
)
@progress_options
@common_options
@click.pass_obj
def forget(
    settings: Settings,
    snaps: tuple[str, ...],
    keep_last: int,
    keep_hourly: int,
    keep_daily: int,
    keep_weekly: int,
    keep_monthly: int,
    keep_yearly: int,
    keep_within: CalendarSpan | None,
    keep_tags: tuple[frozenset[str], ...],
    group_by: str,
    dry_run: bool,
    then_prune: bool,
    allow_all: bool,
) -> int:
    """Remove snapshots by name, or those that no rule keeps.

    The rules apply to each group (one host and its paths) separately. `casfs prune` frees the space.
    """
    from casfs.cli.commands.prune import run_prune
    from casfs.maintenance.forget import forget, plan_policy, select_by_name
    from casfs.maintenance.prune_plan import PruneOptions
    from casfs.maintenance.retention import Policy
    from casfs.repository.opening import OpenOptions, open_for_maintenance, open_for_reading
    from casfs.storage.locks import LockMode

    policy = Policy(
        last=keep_last,
        hourly=keep_hourly,
        daily=keep_daily,
        weekly=keep_weekly,
        monthly=keep_monthly,
        yearly=keep_yearly,
        within=keep_within,
        tags=keep_tags,
    )
    choice = settings.snapshot_filter()
    _check_options(snaps, policy, not choice.is_empty())
    grouping = _grouping(group_by)
    root, output = settings.repository(), settings.output()
    options = OpenOptions(unlock=settings.unlock, sync=settings.sync)
    # A dry run changes nothing, so a user who may only read can do one.
    opened = (
        open_for_reading(root, options)
        if dry_run
        else open_for_maintenance(root, "forget", options, LockMode.SHARED)
    )
    unproven: list[Candidate] = []
    with opened as repository:
        if snaps:
            forgotten = select_by_name(repository, snaps, allow_all, choice)
            kept = len(
                {i for i, _ in repository.snapshots.iterate()} - {c.snapshot_id for c in forgotten}
            )
            _print_named(output, forgotten, dry_run)
        else:
            plan = plan_policy(repository, policy, grouping, choice, allow_all)
            forgotten, kept = plan.forgotten(), plan.kept()
            unproven = plan.unproven
            _print_plan(output, plan, dry_run)
            for candidate in plan.from_future():
                output.warn(
                    f"snapshot {short_id(candidate.snapshot_id)} is from the future "
                    f"({format_time(candidate.time_ns)}): it is kept, and no rule counts it; "
                    "correct the clock, or forget it by its id"
                )
        if not dry_run:
            forget(repository, forgotten)
        gone = {candidate.snapshot_id for candidate in forgotten}
        omitted = {n: e for n, e in repository.snapshots.omitted.items() if n not in gone}
    would = "would be " if dry_run else ""
    output.summary(f"{counted(len(forgotten), 'snapshot')} {would}forgotten, {kept} {would}kept")
    if unproven:
        warn_of_unproven(output, [candidate.snapshot_id for candidate in unproven])
        output.line(
            f"{counted(len(unproven), 'unproven snapshot')} left: no rule counts them; "
            "name one to forget it"
        )
    output.emit(
        "summary",
        forgotten=len(forgotten),
        kept=kept,
        unproven_snapshots=len(unproven),
        dry_run=dry_run,
    )
    code = report_omitted(output, omitted)
    if then_prune and dry_run:
        output.warn("the space that prune would free is unknown until the snapshots are removed")
    elif then_prune:
        run_prune(settings, PruneOptions())
    return code


def _check_options(snaps: tuple[str, ...], policy: Policy, chosen: bool) -> None:
    if snaps and not policy.is_empty():
        raise UsageError("name snapshots or give rules (--keep-…), not both")
    if snaps and chosen and "latest" not in snaps:
        raise UsageError(
            "--host, --tag and --path apply to rules and to `latest`; leave them out to name snapshots"
        )
    if not snaps and policy.is_empty():
        raise UsageError(
            "nothing to do: give a rule such as --keep-daily 7, or name snapshots to remove"
        )


def _grouping(text: str) -> Grouping:
    from casfs.maintenance.forget import Grouping

    words = {word.strip() for word in text.split(",")} - {""}
    known = {"host": "host", "hosts": "host", "path": "paths", "paths": "paths"}
    known |= {"tag": "tags", "tags": "tags"}
    wrong = sorted(words - known.keys() - {"none"})
    if wrong:
        raise UsageError(f"--group-by {wrong[0]!r} is unknown; use host, paths, tags or none")
    wanted = {known[word] for word in words if word in known}
    return Grouping("host" in wanted, "paths" in wanted, "tags" in wanted)


def _print_plan(output: Output, plan: ForgetPlan, dry_run: bool) -> None:
    for key, decisions in plan.groups.items():
        _decision_line(output, dry_run)(_title(key))
        for decision in decisions:
            _print_result(output, decision.snapshot, decision.reasons, dry_run)


def _print_named(output: Output, candidates: list[Candidate], dry_run: bool) -> None:
    for candidate in candidates:
        _print_result(output, candidate, (), dry_run)


def _print_result(
    output: Output, candidate: Candidate, reasons: tuple[str, ...], dry_run: bool
) -> None:
    snapshot = candidate.snapshot
    time = format_time(candidate.time_ns) if snapshot is not None else "(it cannot be read)"
    decision = f"keep    {', '.join(reasons)}" if reasons else "forget"
    line = f"  {short_id(candidate.snapshot_id)}  {time}  {escape_path(decision.encode())}"
    _decision_line(output, dry_run)(line)
    output.emit(
        "snapshot",
        id=candidate.snapshot_id.hex(),
        time=iso_time(candidate.time_ns) if snapshot is not None else None,
        host=snapshot.host if snapshot is not None else None,
        **(json_paths(snapshot.paths) if snapshot is not None else {"paths": None}),
        tags=list(candidate.tags),
        keep=bool(reasons),
        reasons=list(reasons),
        dry_run=dry_run,
    )


def _decision_line(output: Output, dry_run: bool) -> Callable[[str], None]:
    """Return the function that prints a decision: --quiet hides those that are carried out."""
    return output.line if dry_run else output.summary


def _title(key: GroupKey) -> str:
    parts = []
    if key.host is not None:
        parts.append(f"host {escape_path(key.host.encode())}")
    if key.paths is not None:
        where = f" in {escape_path(key.directory)}" if key.directory else ""
        parts.append(" ".join(escape_path(path) for path in key.paths) + where)
    if key.tags is not None:
        parts.append(f"tags {escape_path(', '.join(key.tags).encode()) or 'none'}")
    return ", ".join(parts) or "all snapshots"
