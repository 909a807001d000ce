"""Install, remove and query the systemd units of profiles through `systemctl`."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from casfs.atomic_file import replace_file
from casfs.errors import CasfsError, StorageError, UsageError
from casfs.schedule.units import Units, unit_name
from casfs.user_dirs import base_folder

SYSTEM_UNITS = Path("/etc/systemd/system")
_BOOTED = Path("/run/systemd/system")


@dataclass(frozen=True, slots=True)
class TimerStatus:
    """The status of a profile's timer in systemd; a time is None if there is none or it is unknown."""

    is_installed: bool
    is_active: bool
    last_run: datetime | None
    next_run: datetime | None
    result: str


def is_running(booted: Path = _BOOTED) -> bool:
    """Return whether this machine was booted with systemd (the test of sd_booted(3))."""
    return booted.is_dir()


def check_calendar(expression: str) -> None:
    """Raise UsageError if systemd does not accept a calendar expression."""
    if "\n" in expression or not expression.strip():
        raise UsageError(f"the schedule {expression!r} is not one line")
    try:
        done = subprocess.run(
            ["systemd-analyze", "calendar", "--", expression],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return  # systemctl reports it when the timer is enabled
    if done.returncode:
        raise UsageError(
            f"the schedule {expression!r} is not a calendar expression of systemd such as daily or "
            "Mon..Fri 02:30 (see systemd.time(7))"
        )


class SystemdTimers:
    """The timers of profiles in the system's manager, or in this user's manager."""

    def __init__(self, system: bool, folder: Path | None = None) -> None:
        self._scope = ["--system"] if system else ["--user"]
        self._folder = folder or (SYSTEM_UNITS if system else _user_units())

    def paths(self, profile: str) -> tuple[Path, Path]:
        """Return the paths of the service and the timer of a profile."""
        name = unit_name(profile)
        return self._folder / f"{name}.service", self._folder / f"{name}.timer"

    def install(self, profile: str, units: Units) -> None:
        """Write the units, and start the timer now and at each boot; raises CasfsError."""
        service, timer = self.paths(profile)
        _write(service, units.service)
        _write(timer, units.timer)
        self._control("daemon-reload")
        self._control("enable", "--now", timer.name)
        # An active timer uses the new expression only after a restart.
        self._control("restart", timer.name)

    def remove(self, profile: str) -> bool:
        """Stop the timer and remove the units; return whether there were any. A running run continues."""
        paths = self.paths(profile)
        if not any(os.path.lexists(path) for path in paths):
            return False
        self._control("disable", "--now", paths[1].name)
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise StorageError("remove the unit", str(path), error) from error
        self._control("daemon-reload")
        return True

    def status(self, profile: str) -> TimerStatus:
        """Return the status of a profile's timer; raises CasfsError."""
        service, timer = self.paths(profile)
        if not timer.exists():
            return TimerStatus(False, False, None, None, "")
        shown = self._show(timer.name, "ActiveState", "LastTriggerUSec", "NextElapseUSecRealtime")
        result = self._show(service.name, "Result", "ActiveState")
        at_work = result.get("ActiveState") in ("activating", "active")
        return TimerStatus(
            True,
            shown.get("ActiveState") == "active",
            _moment(shown.get("LastTriggerUSec", "")),
            _moment(shown.get("NextElapseUSecRealtime", "")),
            "running" if at_work else result.get("Result", ""),
        )

    def _show(self, unit: str, *properties: str) -> dict[str, str]:
        text = self._control("show", "--timestamp=utc", f"--property={','.join(properties)}", unit)
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    def _control(self, *words: str) -> str:
        return _run(["systemctl", *self._scope, *words])


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise CasfsError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit {done.returncode}"
        raise CasfsError(f"{' '.join(command)} failed: {reason}")
    return done.stdout


def _moment(text: str) -> datetime | None:
    """Parse a time that systemctl prints in UTC, such as `Sun 2026-11-29 00:00:00 UTC`."""
    match = re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", text)
    if match is None or "UTC" not in text:
        return None
    return datetime.fromisoformat(f"{match[0]}+00:00")


def _user_units() -> Path:
    return base_folder("XDG_CONFIG_HOME", ".config") / "systemd" / "user"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode(), mode=0o644)
    except OSError as error:
        raise StorageError("write the unit", str(path), error) from error
