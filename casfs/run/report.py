"""The summary of a run as a text for people: on the terminal, in a mail, in the body of a ping."""

from __future__ import annotations

from casfs.display import counted, format_size, single_line
from casfs.run.outcome import Outcome, RunSummary, StepName, StepOutcome, StepStatus

_TITLES = {
    Outcome.SUCCESS: "succeeded",
    Outcome.WARNING: "succeeded with warnings",
    Outcome.FAILED: "failed",
}


def headline(summary: RunSummary) -> str:
    """Return the first line of the summary, without a line feed."""
    return summary_text(summary).partition("\n")[0]


def summary_text(summary: RunSummary) -> str:
    """Return all that is worth knowing of a run, a line for each step; ends with a line feed."""
    lines = [
        f"casfs profile {summary.profile} on {summary.host}: {_TITLES[summary.outcome]} "
        f"(exit {summary.exit}) in {_seconds(summary.seconds)}"
    ]
    if summary.error is not None:
        lines.append(f"  {summary.error}")
    lines += [f"  {step_line(step)}" for step in summary.steps]
    for step in summary.steps:
        lines += [f"    {_problem(problem)}" for problem in step.problems]
        left = step.problem_count - len(step.problems)
        if left > 0:
            lines.append(f"    and {left} other problems of {step.title}")
    lines += [
        f"  hook {hook.hook}: failed with exit {hook.exit}" for hook in summary.hooks if hook.exit
    ]
    return "\n".join(single_line(line) for line in lines) + "\n"


def step_line(step: StepOutcome) -> str:
    """Return one line about a step."""
    if step.status is not StepStatus.RAN:
        return f"{step.title}: {step.status} ({step.reason})"
    parts = [f"{step.title}: {_verdict(step)} in {_seconds(step.seconds)}"]
    parts += _numbers(step)
    if step.reason is not None:
        parts.append(step.reason)
    return "; ".join(parts)


def _verdict(step: StepOutcome) -> str:
    if not step.exit:
        return "done"
    meanings = {
        3: "some sources could not be read",
        4: "some files changed while they were read",
        5: "damage was found",
        6: "the repository is locked",
        130: "interrupted",
    }
    return f"{meanings.get(step.exit, 'failed')} (exit {step.exit})"


def _numbers(step: StepOutcome) -> list[str]:
    """Return the numbers of a step that the summary for people has."""
    size, files = step.number("bytes"), step.number("files")
    if step.step is StepName.BACKUP and size is not None and files is not None:
        texts = [
            f"{counted(files, 'file')}, {format_size(size)}, "
            f"{format_size(step.number('new_bytes') or 0)} added"
        ]
        for field, what in (("unreadable", "unreadable"), ("flagged", "changed")):
            if step.number(field):
                texts.append(f"{step.number(field)} {what}")
        return texts
    if step.step is StepName.FORGET and step.number("forgotten") is not None:
        forgotten = counted(step.number("forgotten") or 0, "snapshot")
        return [f"{forgotten} forgotten, {step.number('kept')} kept"]
    freed = step.number("freed_bytes")
    if step.step is StepName.PRUNE and freed is not None:
        waiting = step.number("waiting_bytes")
        later = f", {format_size(waiting)} by a later prune" if waiting else ""
        return [f"{format_size(freed)} freed{later}" if freed or later else "nothing to free"]
    if step.step is StepName.CHECK and step.number("damage") is not None:
        read = step.number("read_bytes") or 0
        return [counted(step.number("damage") or 0, "problem"), f"{format_size(read)} read"]
    copied = step.number("copied")
    if step.step is StepName.MIRROR and copied is not None:
        copied_size = format_size(step.number("copied_bytes") or 0)
        return [f"{counted(copied, 'object')}, {copied_size} copied"]
    return []


def _problem(problem: dict[str, object]) -> str:
    path = problem.get("path")
    message = str(problem.get("message", "unknown problem"))
    return f"{path}: {message}" if isinstance(path, str) and path else message


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
