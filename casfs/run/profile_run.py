"""One run of a profile: `run_profile` is the whole sequence.

The steps are backup, forget, prune when due, check when due, mirror. After a step that fails, the steps that
are still useful run: a check, a prune that may free the space that the backup lacked, a mirror of earlier
snapshots. `forget` does not run after a backup that failed or that could not read one of its sources, so
that empty snapshots never replace good ones.

Hooks run around the steps. A hook that fails makes the run fail; if `before` fails, no step runs. Metrics,
pings and the notify command come last and do not change the outcome.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

import msgspec

from casfs import interruption
from casfs.config.profiles import Profile
from casfs.errors import CasfsError
from casfs.run.due import PlannedStep, plan_steps
from casfs.run.metrics import metrics_text, write_metrics
from casfs.run.notifications import Ping, Pinger, is_wanted, run_notification
from casfs.run.outcome import (
    EXIT_CHANGED,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_LOCKED,
    EXIT_UNREADABLE,
    HookOutcome,
    JsonObject,
    Outcome,
    RunSummary,
    StepName,
    StepOutcome,
    StepStatus,
    outcome_of,
    worst_exit,
)
from casfs.run.processes import VerbEnd, VerbRunner, run_hook
from casfs.run.records import after_run
from casfs.run.report import summary_text
from casfs.run.state import ProfileFiles, ProfileState
from casfs.run.step_commands import step_arguments

log = logging.getLogger(__name__)

_PUBLISHED = (0, EXIT_UNREADABLE, EXIT_CHANGED)
_START_PATIENCE_S = 10.0
_INTERRUPTED_PATIENCE_S = 5.0


class RunMonitor(Protocol):
    """A receiver of the progress of a run."""

    def step_begins(self, step: PlannedStep) -> None:
        """Receive that a step begins."""

    def step_ends(self, outcome: StepOutcome) -> None:
        """Receive the outcome of a step, also of one that did not run."""


class Verbs(Protocol):
    """A runner of casfs's verbs: `VerbRunner`, or a double of it in tests."""

    def run(
        self, verb: Sequence[str], on_problem: Callable[[JsonObject], None] | None = None
    ) -> VerbEnd:
        """Run a verb to its end."""


@dataclass(frozen=True, slots=True)
class ProfileJob:
    """A profile to run on this host.

    `configuration` is the file that holds the profile; `environment` is that of the verbs and the hooks.
    """

    name: str
    profile: Profile
    host: str
    configuration: Path
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def files(self) -> ProfileFiles:
        """Return the files of the profile in the state folder."""
        return ProfileFiles(self.name, self.configuration)

    def verbs(self, lock_fd: int) -> Verbs:
        """Return a runner of verbs on the profile's repository."""
        own = {k: v for k, v in self.environment.items() if k != "CASFS_REPOSITORY"}
        return VerbRunner(["-r", self.profile.repository], own, lock_fd)

    def pinger(self) -> Pinger | None:
        """Return the sender of the profile's pings, or None if the profile has no ping URL."""
        return Pinger(self.profile.ping) if self.profile.ping is not None else None


def run_profile(
    job: ProfileJob, monitor: RunMonitor, now_s: Callable[[], float] = time.time
) -> RunSummary:
    """Run a profile and return its summary; raises LockedError if it is running already."""
    with job.files().lock() as lock:
        run = _Run(job, monitor, job.verbs(lock.fd), now_s)
        unexpected: Exception | None = None
        try:
            run.announce_start()
            run.call_hook("before")
            for step in run.planned:
                run.do_step(step)
            run.measure_repository()
            if outcome_of(run.exit) is not Outcome.FAILED:
                run.call_hook("after")
        except KeyboardInterrupt as error:
            interruption.acknowledge(error)
            run.interrupt()
        except Exception as error:
            # After an error in casfs too, the record, the pings and the notification report the run.
            unexpected = error
            run.fail(f"the run ended with an error in casfs: {error}")
        if outcome_of(run.exit) is Outcome.FAILED:
            run.call_hook("failure")
        run.call_hook("finally")
        run.write_record()
        run.notify()
        if unexpected is not None:
            raise unexpected
        return run.summary()


class _Run:
    """A run in progress: the outcomes so far, and the decisions that follow from them."""

    def __init__(
        self, job: ProfileJob, monitor: RunMonitor, verbs: Verbs, now_s: Callable[[], float]
    ) -> None:
        self._job = job
        self._profile = job.profile
        self._monitor = monitor
        self._verbs = verbs
        self._now_s = now_s
        self._files = job.files()
        self._state = self._files.load()
        self._started_s = now_s()
        self._start = time.monotonic()
        self._steps: list[StepOutcome] = []
        self._hooks: list[HookOutcome] = []
        self._error: str | None = None
        self._was_interrupted = False
        self._has_failed = False
        self._lost_sources = 0
        self._measured: JsonObject | None = None
        self._pinger = job.pinger()
        self.planned = plan_steps(job.profile, self._state, self._started_s)

    @property
    def exit(self) -> int:
        """Return the exit code of the run so far."""
        codes = [step.exit for step in self._steps if step.exit is not None]
        codes += [EXIT_FAILED for hook in self._hooks if hook.exit]
        if self._has_failed:
            codes.append(EXIT_FAILED)
        if self._was_interrupted:
            codes.append(EXIT_INTERRUPTED)
        return worst_exit(codes)

    def summary(self) -> RunSummary:
        """Return the summary of the run so far."""
        backup = self._step(StepName.BACKUP)
        snapshot = backup.result.get("id") if backup is not None and backup.result else None
        return RunSummary(
            profile=self._job.name,
            repository=self._profile.repository,
            host=self._job.host,
            started=datetime.fromtimestamp(self._started_s).astimezone().isoformat(),
            seconds=round(time.monotonic() - self._start, 3),
            exit=self.exit,
            outcome=outcome_of(self.exit),
            snapshot=snapshot if isinstance(snapshot, str) else None,
            error=self._error,
            steps=tuple(self._steps),
            hooks=tuple(self._hooks),
        )

    def announce_start(self) -> None:
        """Record that a run began, and send the start ping."""
        self._save(msgspec.structs.replace(self._state, last_start_s=self._started_s))
        if self._pinger is not None:
            # The backup must not wait long for a monitor that does not answer.
            self._pinger.hurried(_START_PATIENCE_S).send(Ping.START, "")

    def do_step(self, step: PlannedStep) -> None:
        """Run a step, or record why it does not run."""
        reason = self._reason_to_skip(step)
        if reason is not None:
            outcome = StepOutcome(
                step=step.step, target=step.target, status=StepStatus.SKIPPED, reason=reason
            )
        elif step.waits_s:
            outcome = StepOutcome(
                step=step.step,
                target=step.target,
                status=StepStatus.NOT_DUE,
                reason=f"due in {_rough_duration(step.waits_s)}",
            )
        else:
            self._monitor.step_begins(step)
            outcome = self._run_verb(step)
        self._steps.append(outcome)
        self._monitor.step_ends(outcome)

    def _run_verb(self, step: PlannedStep) -> StepOutcome:
        arguments = step_arguments(
            step.step, step.target, self._job.name, self._profile, self._job.host
        )
        on_problem = self._note_lost_source if step.step is StepName.BACKUP else None
        end = self._verbs.run(arguments, on_problem)
        self._was_interrupted |= end.was_interrupted
        return StepOutcome(
            step=step.step,
            target=step.target,
            exit=end.exit,
            started_s=end.started_s,
            seconds=round(end.seconds, 3),
            reason=end.output.error,
            result=end.output.result,
            problems=end.output.problems,
            problem_count=end.output.problem_count,
        )

    def _note_lost_source(self, problem: JsonObject) -> None:
        """Count a problem of a whole source; ignore problems of entries inside a source."""
        sources = {source.path.strip("/") for source in self._profile.sources}
        kind, path = problem.get("kind"), problem.get("path")
        is_source = isinstance(path, str) and path.strip("/") in sources
        if kind == "missing source" or (kind == "unreadable" and is_source):
            self._lost_sources += 1

    def _reason_to_skip(self, step: PlannedStep) -> str | None:
        if self._was_interrupted:
            return "the run was interrupted"
        if any(hook.hook == "before" and hook.exit for hook in self._hooks):
            return "the before hook failed"
        backup = self._step(StepName.BACKUP)
        if backup is None or backup.exit is None:
            return None
        if backup.exit == EXIT_LOCKED:
            return "the repository is locked"
        if step.step is StepName.FORGET:
            if backup.exit not in _PUBLISHED:
                return "nothing is forgotten when the backup has failed"
            if self._lost_sources:
                return "nothing is forgotten when a source is missing"
        return None

    def _step(self, name: StepName) -> StepOutcome | None:
        return next((step for step in self._steps if step.step is name), None)

    def call_hook(self, name: str) -> None:
        """Run a hook, if the profile has it; if the hook fails, the run fails."""
        hooks = self._profile.hooks
        command = getattr(hooks, "finally_" if name == "finally" else name)
        if command is None:
            return
        summary = self.summary()
        text = json.dumps(msgspec.to_builtins(summary)).encode() + b"\n"
        try:
            outcome = run_hook(name, command.text, text, self._hook_environment(name, summary))
        except KeyboardInterrupt as error:
            interruption.acknowledge(error)
            self.interrupt()
            return
        except OSError as error:
            log.warning("the %s hook could not be run: %s", name, error)
            outcome = HookOutcome(hook=name, exit=127, seconds=0.0)
        self._hooks.append(outcome)
        if outcome.exit:
            sentence = f"the {name} hook failed with exit {outcome.exit}"
            log.warning("%s", sentence)
            self._error = self._error or sentence

    def interrupt(self) -> None:
        """Record that the run was interrupted; the remaining steps do not run."""
        self._was_interrupted = True
        self._error = self._error or "the run was interrupted"

    def fail(self, sentence: str) -> None:
        """Record that the run failed outside its steps and hooks."""
        self._has_failed = True
        self._error = self._error or sentence

    def _hook_environment(self, name: str, summary: RunSummary) -> dict[str, str]:
        """Return the environment of a hook, in which `casfs` uses the profile's repository."""
        failed = [step.title for step in summary.steps if step.exit]
        found = dict(self._job.environment) | {
            "CASFS_HOOK": name,
            "CASFS_PROFILE": summary.profile,
            "CASFS_REPOSITORY": summary.repository,
            "CASFS_HOST": summary.host,
            "CASFS_EXIT": str(summary.exit),
            "CASFS_OUTCOME": str(summary.outcome),
            "CASFS_SECONDS": f"{summary.seconds:.0f}",
            "CASFS_SNAPSHOT": summary.snapshot or "",
            "CASFS_ERROR": summary.error or "",
            "CASFS_FAILED_STEPS": ",".join(failed),
        }
        backup = self._step(StepName.BACKUP)
        for variable, field_name in (
            ("CASFS_FILES", "files"),
            ("CASFS_BYTES", "bytes"),
            ("CASFS_ADDED_BYTES", "new_bytes"),
            ("CASFS_FLAGGED", "flagged"),
            ("CASFS_UNREADABLE", "unreadable"),
        ):
            number = backup.number(field_name) if backup is not None else None
            found[variable] = "" if number is None else str(number)
        return found

    def measure_repository(self) -> None:
        """Read the numbers of the repository for metrics, if some step could reach the repository."""
        reached = any(step.exit in _PUBLISHED for step in self._steps)
        if self._profile.metrics_file is None or self._was_interrupted or not reached:
            return
        end = self._verbs.run(["stats", "--storage"])
        self._was_interrupted |= end.was_interrupted
        self._measured = end.output.result if end.exit == 0 else None

    def write_record(self) -> None:
        """Save the record of the run, and write the metrics file from it."""
        state = after_run(
            self._state, self.summary(), self._started_s, self._now_s(), self._measured
        )
        self._save(state)
        if self._profile.metrics_file is not None:
            try:
                text = metrics_text(state, self._profile.repository)
                write_metrics(Path(self._profile.metrics_file.path), text)
            except CasfsError as error:
                log.warning("%s", error)

    def notify(self) -> None:
        """Send the ping and run the command that report the outcome."""
        summary = self.summary()
        text = summary_text(summary)
        if self._pinger is not None:
            if self._was_interrupted:
                # A machine that shuts down leaves little time.
                self._pinger = self._pinger.hurried(_INTERRUPTED_PATIENCE_S)
            failed = summary.outcome is Outcome.FAILED
            self._pinger.send(Ping.FAILURE if failed else Ping.SUCCESS, text)
        notification = self._profile.notify
        if notification is not None and is_wanted(notification, summary.outcome):
            run_notification(notification, text, self._hook_environment("notify", summary))

    def _save(self, state: ProfileState) -> None:
        try:
            self._files.save(state)
        except CasfsError as error:
            log.warning("%s; the next run takes every step for due", error)


def _rough_duration(seconds: float) -> str:
    if seconds < 7200:
        return f"{max(1, round(seconds / 60))} min"
    return f"{round(seconds / 3600)} h" if seconds < 172_800 else f"{round(seconds / 86_400)} d"
