"""The command run: run a profile of the configuration."""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from casfs.cli.options import complete_profiles, configuration_options
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.errors import CasfsError, LockedError, UsageError

if TYPE_CHECKING:
    from casfs.cli.output import Output
    from casfs.config.file import Configuration
    from casfs.config.profiles import Profile
    from casfs.run.due import PlannedStep
    from casfs.run.outcome import RunSummary, StepOutcome
    from casfs.run.profile_run import ProfileJob


@click.command(cls=Verb)
@click.argument("profile", metavar="PROFILE", shell_complete=complete_profiles)
@click.option("--dry-run", "-n", is_flag=True, help="List the steps that are due; run nothing.")
@click.option(
    "--scheduled",
    is_flag=True,
    help="Run as a timer does: exit 75 on battery, without network, or while the profile runs.",
)
@click.option(
    "--if-missed",
    is_flag=True,
    help="Run only if the last time of the schedule was missed.",
)
@configuration_options
@click.pass_obj
def run(settings: Settings, profile: str, dry_run: bool, scheduled: bool, if_missed: bool) -> int:
    """Run a profile: backup, forget, prune, check and mirror.

    Prune and check run when they are due.

    Hooks, pings, the notify command and the metrics file are those of the profile. The exit code is the
    worst of the steps; 6 where the profile is running already.
    """
    from casfs.run.profile_run import run_profile

    if settings.repo is not None:
        raise UsageError("a profile names its repository itself; leave --repo out")
    configuration = settings.configuration()
    job = job_of(settings, configuration, profile)
    output = settings.output()
    if if_missed and not _was_missed(job):
        return 0
    if dry_run:
        _print_plan(output, job)
        return 0
    printer = _RunPrinter(output)
    if not scheduled:
        summary = run_profile(job, printer)
    else:
        from casfs.schedule.units import EXIT_PUT_OFF

        reason = _reason_to_put_off(configuration, job.profile)
        try:
            if reason is not None:
                raise LockedError(reason)
            summary = run_profile(job, printer)
        except LockedError as error:
            output.line(f"profile {profile} is put off: {error}")
            output.emit("put_off", profile=profile, reason=str(error), exit=EXIT_PUT_OFF)
            return EXIT_PUT_OFF
    printer.run_ends(summary)
    return summary.exit


def job_of(settings: Settings, configuration: Configuration, name: str) -> ProfileJob:
    """Return the profile to run; raise NotFoundError, or UsageError if a command is missing."""
    from casfs.cli.app import VERBS
    from casfs.config.file import VARIABLE
    from casfs.run.profile_run import ProfileJob

    profile = configuration.profile(name)
    if profile.mirror_to and "mirror" not in VERBS:
        raise configuration.file_of("profiles", name).error(
            ("profiles", name, "mirror-to"),
            "this version of casfs has no verb mirror and cannot do that; remove the key",
        )
    environment = dict(os.environ)
    if settings.config is not None:
        # The steps and the hooks read the same file.
        environment[VARIABLE] = str(Path(settings.config).absolute())
    return ProfileJob(
        name,
        profile,
        profile.host or socket.gethostname(),
        configuration.file_of("profiles", name).path,
        environment,
    )


class _RunPrinter:
    """A run while it goes on, on standard output.

    Where nothing can be printed any more, the run goes on: a backup does not depend on its reader.
    """

    def __init__(self, output: Output) -> None:
        self._output = output

    def step_begins(self, step: PlannedStep) -> None:
        """Print nothing: the step shows its progress itself."""

    def step_ends(self, outcome: StepOutcome) -> None:
        """Print what became of a step."""
        from casfs.run.report import step_line

        self._print(step_line(outcome), "step", _json(outcome))

    def run_ends(self, summary: RunSummary) -> None:
        """Print what became of the run."""
        from casfs.run.report import headline

        fields = _json(summary)
        self._print(headline(summary), fields.pop("type"), fields)

    def _print(self, line: str, kind: str, fields: dict[str, Any]) -> None:
        self._output.line(line)
        self._output.emit(kind, **fields)
        sys.stdout.flush()


def _json(value: Any) -> dict[str, Any]:
    import msgspec

    found: dict[str, Any] = msgspec.to_builtins(value)
    return found


def _print_plan(output: Output, job: ProfileJob) -> None:
    from casfs.run.due import plan_steps
    from casfs.run.step_commands import step_arguments

    for step in plan_steps(job.profile, job.files().load(), time.time()):
        arguments = step_arguments(step.step, step.target, job.name, job.profile, job.host)
        command = shlex.join(["casfs", "-r", job.profile.repository, *arguments])
        due = "due" if not step.waits_s else f"due in {step.waits_s / 3600:.1f} h"
        output.line(f"{step.key}: {due}: {command}")
        output.emit(
            "step",
            step=str(step.step),
            mirror_to=step.target,
            due=not step.waits_s,
            waits_seconds=round(step.waits_s),
            arguments=["casfs", "-r", job.profile.repository, *arguments],
            dry_run=True,
        )


def _reason_to_put_off(configuration: Configuration, profile: Profile) -> str | None:
    from casfs.config.values import is_on_network
    from casfs.schedule.conditions import has_network, is_on_battery

    timetable = profile.timetable()
    if (timetable is None or not timetable.on_battery) and is_on_battery():
        return "the machine runs on battery"
    names = (profile.repository, *profile.mirror_to)
    if any(is_on_network(configuration.repository(name).url) for name in names):
        return None if has_network() else "there is no network"
    return None


def _was_missed(job: ProfileJob) -> bool:
    """Return whether no run has ended since the last time of the schedule."""
    from datetime import datetime

    from casfs.schedule.calendar import parse_calendar

    timetable = job.profile.timetable()
    if timetable is None:
        raise UsageError(f"profile {job.name} has no schedule; --if-missed needs one")
    last = parse_calendar(timetable.calendar).last_before(datetime.now())
    ended_s = job.files().load().last_end_s
    if last is None:
        raise CasfsError(f"the schedule of profile {job.name} has no time before now")
    return ended_s is None or ended_s < last.timestamp()
