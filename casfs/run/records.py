"""Compute the record after a run from the record before it and the summary. Without I/O.

Only a step that measured a number again replaces it; a failed step leaves the earlier numbers.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from casfs.run.due import PlannedStep
from casfs.run.outcome import (
    EXIT_CHANGED,
    JsonObject,
    Outcome,
    RunSummary,
    StepName,
    StepOutcome,
    StepStatus,
)
from casfs.run.state import BackupNumbers, ProfileState, RepositoryNumbers, StepRecord


def after_run(
    before: ProfileState,
    summary: RunSummary,
    started_s: float,
    ended_s: float,
    measured: JsonObject | None,
) -> ProfileState:
    """Return the record after a run; `measured` is the result of `casfs stats --storage`, if it ran."""
    succeeded = summary.outcome is not Outcome.FAILED
    ran = [step for step in summary.steps if step.status is StepStatus.RAN]
    backup = before.backup
    damage = before.damage
    for step in ran:
        if step.step is StepName.BACKUP:
            backup = _backup_numbers(step) or backup
        if step.step is StepName.CHECK and step.number("damage") is not None:
            damage = step.number("damage")
    return msgspec.structs.replace(
        before,
        last_start_s=started_s,
        last_end_s=ended_s,
        last_success_s=ended_s if succeeded else before.last_success_s,
        last_exit=summary.exit,
        last_seconds=summary.seconds,
        failures_in_a_row=0 if succeeded else before.failures_in_a_row + 1,
        damage=damage,
        steps=before.steps | {_key(step): _step_record(before, step) for step in ran},
        backup=backup,
        repository=_repository_numbers(measured, ended_s) or before.repository,
    )


def _key(step: StepOutcome) -> str:
    return PlannedStep(step.step, step.target).key


def _step_record(before: ProfileState, step: StepOutcome) -> StepRecord:
    earlier = before.steps.get(_key(step))
    started_s = step.started_s or 0.0
    success_s = earlier.last_success_s if earlier is not None else None
    return StepRecord(
        last_run_s=started_s,
        last_success_s=started_s if step.exit in (0, EXIT_CHANGED) else success_s,
        exit=step.exit or 0,
        seconds=step.seconds,
    )


def _backup_numbers(step: StepOutcome) -> BackupNumbers | None:
    """Return the numbers of a backup, or None if it published no snapshot."""
    snapshot = step.result.get("id") if step.result is not None else None
    if not isinstance(snapshot, str):
        return None
    return BackupNumbers(
        time_s=step.started_s or 0.0,
        snapshot=snapshot,
        files=step.number("files") or 0,
        bytes=step.number("bytes") or 0,
        added_bytes=step.number("new_bytes") or 0,
        flagged=step.number("flagged") or 0,
        unreadable=step.number("unreadable") or 0,
        vanished=step.number("vanished") or 0,
    )


def _repository_numbers(measured: JsonObject | None, now_s: float) -> RepositoryNumbers | None:
    if measured is None:
        return None
    try:
        return RepositoryNumbers(
            time_s=now_s,
            packs=int(measured["packs"]),
            bytes=int(measured["pack_bytes"]),
            unverified_packs=int(measured["unverified_packs"]),
            oldest_verification_s=_timestamp(measured["oldest_verification"]),
        )
    except (KeyError, TypeError, ValueError):
        return None


def _timestamp(value: Any) -> float | None:
    return datetime.fromisoformat(value).timestamp() if value is not None else None
