"""The command schedule: run profiles by themselves, under systemd or cron."""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from casfs.cli.commands.run import job_of
from casfs.cli.options import complete_profiles, configuration_options
from casfs.cli.output import format_time, iso_time
from casfs.cli.settings import Settings
from casfs.cli.verbs import SuggestingGroup
from casfs.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from casfs.cli.output import Output
    from casfs.config.file import Configuration
    from casfs.config.profiles import Profile, Schedule
    from casfs.run.state import ProfileState
    from casfs.schedule.systemd import TimerStatus
    from casfs.schedule.units import ScheduledCommand

_LINGERING = Path("/var/lib/systemd/linger")
_XDG = ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME")


@click.group(cls=SuggestingGroup)
@configuration_options
def schedule() -> None:
    """Run profiles at the times that their `schedule` names."""


def _scope_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--scheduler",
        type=click.Choice(["systemd", "cron"]),
        help="What starts the runs [default: systemd where it runs, else cron].",
    )(command)
    return click.option(
        "--system/--user",
        "system",
        default=None,
        help="For the whole machine, or for you alone [default: --system for root].",
    )(command)


@schedule.command()
@click.argument("profile", metavar="PROFILE", shell_complete=complete_profiles)
@click.option(
    "--print", "only_print", is_flag=True, help="Show what would be written; change nothing."
)
@_scope_options
@configuration_options
@click.pass_obj
def install(
    settings: Settings,
    profile: str,
    only_print: bool,
    system: bool | None,
    scheduler: str | None,
) -> None:
    """Install and start the schedule of a profile.

    A time at which the machine was off, on battery, or without network is made up for. A run is never
    started beside another one of the same profile.
    """
    configuration = settings.configuration()
    found = job_of(settings, configuration, profile).profile
    timetable = found.timetable()
    if timetable is None:
        raise UsageError(
            f'profile {profile} has no schedule; add schedule = "daily" to [profiles.{profile}]'
        )
    is_system = _is_system(system)
    command = _scheduled_command(settings, configuration, profile, found, is_system)
    if _uses_systemd(scheduler):
        _install_units(settings.output(), command, timetable, is_system, only_print)
    else:
        _install_lines(settings.output(), command, timetable, only_print)


@schedule.command()
@click.argument("profile", metavar="PROFILE", shell_complete=complete_profiles)
@_scope_options
@configuration_options
@click.pass_obj
def remove(settings: Settings, profile: str, system: bool | None, scheduler: str | None) -> None:
    """Stop and remove the schedule of a profile.

    A run that goes on now is not stopped."""
    from casfs.schedule.cron import has_lines, read_crontab, with_lines, write_crontab
    from casfs.schedule.systemd import SystemdTimers

    _require_name(profile)
    if _uses_systemd(scheduler):
        was_there = SystemdTimers(_is_system(system)).remove(profile)
    else:
        crontab = read_crontab()
        was_there = has_lines(crontab, profile)
        if was_there:
            write_crontab(with_lines(crontab, profile, ""))
    if not was_there:
        raise NotFoundError(f"profile {profile} has no schedule installed here")
    output = settings.output()
    output.line(f"the schedule of profile {profile} was removed")
    output.emit("schedule", profile=profile, installed=False)


@schedule.command()
@click.argument("profile", metavar="[PROFILE]", required=False, shell_complete=complete_profiles)
@_scope_options
@configuration_options
@click.pass_obj
def status(
    settings: Settings, profile: str | None, system: bool | None, scheduler: str | None
) -> None:
    """Show the last and the next run of each scheduled profile."""
    configuration = settings.configuration()
    names = [profile] if profile is not None else []
    if profile is None:
        names = [name for name, found in configuration.profiles.items() if found.schedule]
        if not names:
            raise NotFoundError("no profile has a schedule")
    for name in names:
        _print_status(settings, configuration, name, _is_system(system), _uses_systemd(scheduler))


def _install_units(
    output: Output,
    command: ScheduledCommand,
    timetable: Schedule,
    system: bool,
    only_print: bool,
) -> None:
    from casfs.schedule.systemd import SystemdTimers, check_calendar
    from casfs.schedule.units import render_units

    check_calendar(timetable.calendar)
    delay = timetable.random_delay
    units = render_units(
        command, timetable.calendar, delay.seconds if delay is not None else None, system
    )
    timers = SystemdTimers(system)
    service, timer = timers.paths(command.profile)
    if only_print:
        for path, text in ((service, units.service), (timer, units.timer)):
            output.line(f"# {path}\n{text}")
            output.emit("unit", unit_file=str(path), text=text)
        return
    timers.install(command.profile, units)
    output.line(f"profile {command.profile} runs {timetable.calendar}, by {timer}")
    output.emit(
        "schedule",
        profile=command.profile,
        installed=True,
        scheduler="systemd",
        calendar=timetable.calendar,
        unit_files=[str(service), str(timer)],
    )
    if not system and not (_LINGERING / pwd.getpwuid(os.getuid()).pw_name).exists():
        output.warn(
            "the schedule works only while you are logged in; loginctl enable-linger changes that"
        )


def _install_lines(
    output: Output, command: ScheduledCommand, timetable: Schedule, only_print: bool
) -> None:
    from casfs.schedule.calendar import parse_calendar
    from casfs.schedule.cron import read_crontab, render_lines, with_lines, write_crontab

    lines = render_lines(command, parse_calendar(timetable.calendar))
    if only_print:
        output.line(f"# crontab\n{lines}")
        output.emit("unit", unit_file="crontab", text=lines)
        return
    write_crontab(with_lines(read_crontab(), command.profile, lines))
    output.line(f"profile {command.profile} runs {timetable.calendar}, by your crontab")
    output.emit(
        "schedule",
        profile=command.profile,
        installed=True,
        scheduler="cron",
        calendar=timetable.calendar,
        unit_files=[],
    )


def _scheduled_command(
    settings: Settings,
    configuration: Configuration,
    name: str,
    profile: Profile,
    system: bool,
) -> ScheduledCommand:
    from casfs.config.values import is_on_network
    from casfs.schedule.units import ScheduledCommand

    words = [*_program(), "run", "--scheduled"]
    file = configuration.file_of("profiles", name)
    if len(configuration.files) == 1:
        # Without an environment of its own the schedule still reads the file that is read now.
        words += ["--config", str(file.path)]
    environment = {key: os.environ[key] for key in _XDG if os.environ.get(key)}
    if system:
        # systemd gives a system service no home.
        environment["HOME"] = os.path.expanduser("~")
    names = (profile.repository, *profile.mirror_to)
    needs_network = any(is_on_network(configuration.repository(n).url) for n in names)
    return ScheduledCommand(name, [*words, name], environment, needs_network)


def _program() -> list[str]:
    """Return the words that start this casfs from anywhere."""
    script = Path(sys.argv[0])
    if script.name == "casfs" and script.is_file() and os.access(script, os.X_OK):
        return [str(script.absolute())]
    return [sys.executable, "-P", "-m", "casfs"]


def _is_system(system: bool | None) -> bool:
    if system and os.geteuid() != 0:
        raise UsageError("only root can schedule for the whole machine; leave --system out")
    return os.geteuid() == 0 if system is None else system


def _uses_systemd(scheduler: str | None) -> bool:
    from casfs.schedule.systemd import is_running

    return is_running() if scheduler is None else scheduler == "systemd"


def _require_name(profile: str) -> None:
    """Raise UsageError for what no profile can be called: it becomes part of a path."""
    from casfs.config.names import NAME

    if not NAME.fullmatch(profile):
        raise UsageError(f"{profile!r} is not the name of a profile")


def _print_status(
    settings: Settings, configuration: Configuration, name: str, system: bool, systemd: bool
) -> None:
    job = job_of(settings, configuration, name)
    state = job.files().load()
    timetable = job.profile.timetable()
    timer = _timer_status(name, timetable, system, systemd)
    output = settings.output()
    output.line(f"profile {name}")
    output.line(f"  schedule:     {timetable.calendar if timetable is not None else 'none'}")
    installed = ("systemd" if systemd else "cron") if timer.is_installed else None
    active = "" if timer.is_active or installed is None else ", not active"
    output.line(f"  installed:    {installed or 'no'}{active}")
    output.line(f"  next run:     {_shown_moment(timer.next_run)}")
    output.line(f"  last run:     {_shown_seconds(state.last_start_s)}{_verdict(state)}")
    output.line(f"  last success: {_shown_seconds(state.last_success_s)}")
    output.emit(
        "schedule",
        profile=name,
        calendar=timetable.calendar if timetable is not None else None,
        installed=timer.is_installed,
        scheduler=installed,
        active=timer.is_active,
        next_run=timer.next_run.astimezone().isoformat() if timer.next_run is not None else None,
        last_triggered=timer.last_run.astimezone().isoformat() if timer.last_run else None,
        unit_result=timer.result or None,
        last_start=_json_seconds(state.last_start_s),
        last_end=_json_seconds(state.last_end_s),
        last_success=_json_seconds(state.last_success_s),
        last_exit=state.last_exit,
        consecutive_failures=state.failures_in_a_row,
    )


def _timer_status(
    name: str, timetable: Schedule | None, system: bool, systemd: bool
) -> TimerStatus:
    from casfs.schedule.calendar import parse_calendar
    from casfs.schedule.cron import has_lines, read_crontab
    from casfs.schedule.systemd import SystemdTimers, TimerStatus

    if systemd:
        return SystemdTimers(system).status(name)
    is_there = has_lines(read_crontab(), name)
    next_run = None
    if is_there and timetable is not None:
        next_run = parse_calendar(timetable.calendar).first_after(datetime.now())
    return TimerStatus(is_there, is_there, None, next_run, "")


def _verdict(state: ProfileState) -> str:
    if state.last_start_s is None:
        return ""
    if state.last_end_s is None or state.last_end_s < state.last_start_s:
        return " (running, or it was killed)"
    return f" (exit {state.last_exit})"


def _shown_moment(moment: datetime | None) -> str:
    return _shown_seconds(moment.timestamp()) if moment is not None else "none"


def _shown_seconds(seconds: float | None) -> str:
    return format_time(int(seconds * 1_000_000_000)) if seconds is not None else "never"


def _json_seconds(seconds: float | None) -> str | None:
    return iso_time(int(seconds * 1_000_000_000)) if seconds is not None else None
