"""Profiles in the crontab of the user, for machines without systemd.

cron never makes up for a missed time, so each profile has two lines: one for its times, and one that runs
every hour and starts the profile only if it missed its last time (`--if-missed`). The lines are between two
comments that name the profile; the rest of the crontab stays as it is.
"""

from __future__ import annotations

import shlex
import subprocess

from casfs.errors import CasfsError
from casfs.schedule.calendar import CalendarTime
from casfs.schedule.units import ScheduledCommand

_HOURLY_MINUTE = 17


def render_lines(command: ScheduledCommand, times: CalendarTime) -> str:
    """Return the crontab lines of a profile."""
    words = " ".join(
        [
            *(
                f"{name}={shlex.quote(value)}"
                for name, value in sorted(command.environment.items())
            ),
            "nice -n 10",
            *(shlex.quote(word) for word in command.words),
        ]
    )
    begin, end = _marks(command.profile)
    # A percent sign means a line feed to cron.
    text = words.replace("%", "\\%")
    return "\n".join(
        [
            begin,
            f"{times.cron_fields()} {text}",
            f"{_HOURLY_MINUTE} * * * * {text} --if-missed",
            end,
            "",
        ]
    )


def with_lines(crontab: str, profile: str, lines: str) -> str:
    """Return a crontab with the lines of a profile replaced; with no lines, the profile is removed."""
    begin, end = _marks(profile)
    kept: list[str] = []
    is_inside = False
    for line in crontab.splitlines():
        if line == begin:
            is_inside = True
        elif not is_inside:
            kept.append(line)
        is_inside = is_inside and line != end
    return "".join(f"{line}\n" for line in kept) + lines


def has_lines(crontab: str, profile: str) -> bool:
    """Return whether a profile is in a crontab."""
    return _marks(profile)[0] in crontab.splitlines()


def read_crontab() -> str:
    """Return this user's crontab, or "" if there is none; raises CasfsError."""
    done = _crontab(["-l"])
    if done.returncode and "no crontab" not in done.stderr.lower():
        raise CasfsError(f"crontab -l failed: {' '.join(done.stderr.split())}")
    return done.stdout if not done.returncode else ""


def write_crontab(text: str) -> None:
    """Replace this user's crontab; raises CasfsError."""
    done = _crontab(["-"], text)
    if done.returncode:
        raise CasfsError(f"crontab could not be written: {' '.join(done.stderr.split())}")


def _crontab(arguments: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["crontab", *arguments], input=text, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise CasfsError(
            f"crontab cannot be run: {error.strerror}; install cron, or use systemd"
        ) from error


def _marks(profile: str) -> tuple[str, str]:
    return f"# casfs profile {profile}: begin", f"# casfs profile {profile}: end"
