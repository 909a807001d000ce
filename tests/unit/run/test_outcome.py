"""One exit code and one text for all that a run did."""

from __future__ import annotations

import msgspec
import pytest

from casfs.run.outcome import (
    HookOutcome,
    Outcome,
    RunSummary,
    StepName,
    StepOutcome,
    StepStatus,
    outcome_of,
    worst_exit,
)
from casfs.run.report import summary_text

BACKUP = {
    "type": "snapshot",
    "id": "ab" * 32,
    "files": 12,
    "bytes": 5 * 1024 * 1024,
    "new_bytes": 2048,
    "flagged": 1,
    "unreadable": 2,
}


def summary(*steps: StepOutcome, code: int = 0, **more: object) -> RunSummary:
    return msgspec.structs.replace(
        RunSummary(profile="home", repository="nas", host="vm", started="2026-01-01T00:00:00"),
        exit=code,
        outcome=outcome_of(code),
        steps=steps,
        **more,
    )


@pytest.mark.parametrize(
    ("codes", "worst"),
    [
        ([], 0),
        ([0, 0], 0),
        ([0, 4], 4),
        ([4, 3], 3),
        ([3, 6], 6),
        ([6, 1], 1),
        ([1, 5], 5),
        ([5, 130], 130),
        ([2, 1], 2),
        ([0, 77], 1),
    ],
)
def test_the_exit_code_of_a_run_is_the_worst_of_its_steps(codes: list[int], worst: int) -> None:
    assert worst_exit(codes) == worst
    assert worst_exit(reversed(codes)) == worst


def test_only_files_that_changed_are_a_warning() -> None:
    assert outcome_of(0) is Outcome.SUCCESS
    assert outcome_of(4) is Outcome.WARNING
    assert {outcome_of(code) for code in (1, 2, 3, 5, 6, 130)} == {Outcome.FAILED}


def test_the_text_has_a_line_for_each_step_and_its_problems() -> None:
    text = summary_text(
        summary(
            StepOutcome(
                step=StepName.BACKUP,
                exit=3,
                seconds=75,
                result=BACKUP,
                problems=({"path": "/home/a\nb", "message": "it cannot be read"},),
                problem_count=4,
            ),
            StepOutcome(step=StepName.PRUNE, status=StepStatus.NOT_DUE, reason="due in 3 d"),
            StepOutcome(
                step=StepName.MIRROR, target="cloud", exit=1, seconds=2, reason="no network"
            ),
            code=3,
            error="the after hook failed with exit 9",
            hooks=(HookOutcome(hook="after", exit=9, seconds=1.0),),
        )
    )
    assert text.splitlines() == [
        "casfs profile home on vm: failed (exit 3) in 0.0 s",
        "  the after hook failed with exit 9",
        "  backup: some sources could not be read (exit 3) in 1 min 15 s; "
        "12 files, 5.0 MiB, 2.0 KiB added; 2 unreadable; 1 changed",
        "  prune: not due (due in 3 d)",
        "  mirror to cloud: failed (exit 1) in 2.0 s; no network",
        "    /home/a\\nb: it cannot be read",
        "    and 3 other problems of backup",
        "  hook after: failed with exit 9",
    ]


@pytest.mark.parametrize(
    ("freed_bytes", "waiting_bytes", "text"),
    [
        (2048, 0, "2.0 KiB freed"),
        (0, 3072, "0 B freed, 3.0 KiB by a later prune"),
        (0, 0, "nothing to free"),
    ],
)
def test_a_prune_says_what_it_freed_and_what_waits(
    freed_bytes: int, waiting_bytes: int, text: str
) -> None:
    result = {"freed_bytes": freed_bytes, "waiting_bytes": waiting_bytes}
    found = summary_text(summary(StepOutcome(step=StepName.PRUNE, exit=0, result=result)))
    assert f"prune: done in 0.0 s; {text}\n" in found


def test_numbers_of_each_step_are_in_the_text() -> None:
    text = summary_text(
        summary(
            StepOutcome(step=StepName.FORGET, exit=0, result={"forgotten": 2, "kept": 7}),
            StepOutcome(step=StepName.PRUNE, exit=0, result={"freed_bytes": 3 * 1024 * 1024}),
            StepOutcome(step=StepName.CHECK, exit=0, result={"damage": 0, "read_bytes": 1024}),
            StepOutcome(
                step=StepName.MIRROR,
                target="usb",
                exit=0,
                result={"copied": 3, "copied_bytes": 2048},
            ),
        )
    )
    assert "forget: done in 0.0 s; 2 snapshots forgotten, 7 kept" in text
    assert "prune: done in 0.0 s; 3.0 MiB freed" in text
    assert "check: done in 0.0 s; 0 problems; 1.0 KiB read" in text
    assert "mirror to usb: done in 0.0 s; 3 objects, 2.0 KiB copied" in text
    assert "succeeded (exit 0)" in text
