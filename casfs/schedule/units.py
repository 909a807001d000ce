"""systemd units of a profile, as text: a service that runs it once, and a timer.

- `Persistent=true` makes up for a time at which the machine was off. A run on battery, without network or
  beside another run ends with EXIT_PUT_OFF, and systemd starts it again after ten minutes. A condition of the
  unit would skip it until the timer fires again.
- Only the run itself gets SIGTERM. It passes the signal on to the running step, and still notifies.
- Exit 4 (files that changed while they were read) is a success with warnings: the unit does not fail.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EXIT_PUT_OFF = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""

# systemd starts a unit again only after EXIT_PUT_OFF.
_FINAL = "1 2 3 5 6 126 127 130 141 203 SIGABRT SIGBUS SIGKILL SIGSEGV"

_PLAIN_WORD = re.compile(r"[A-Za-z0-9_@+=:,./-]+")


@dataclass(frozen=True, slots=True)
class ScheduledCommand:
    """The command to run and its environment; `needs_network` orders a system unit after the network."""

    profile: str
    words: Sequence[str]
    environment: Mapping[str, str]
    needs_network: bool


@dataclass(frozen=True, slots=True)
class Units:
    """The text of the two units of a profile."""

    service: str
    timer: str


def unit_name(profile: str) -> str:
    """Return the name of a profile's units without their suffix."""
    return f"casfs-{profile}"


def render_units(
    command: ScheduledCommand, calendar: str, random_delay_s: int | None, system: bool
) -> Units:
    """Return the units of a profile; `calendar` is a calendar expression of systemd on one line."""
    lines = [
        "[Unit]",
        f"Description=casfs: run profile {command.profile}",
        "Documentation=man:casfs(1)",
    ]
    if system and command.needs_network:
        # A user's manager has no such target; there a run without network is put off.
        lines += ["Wants=network-online.target", "After=network-online.target"]
    lines += ["", "[Service]", "Type=oneshot"]
    lines += [
        f"Environment={_quote(f'{name}={value}', in_command=False)}"
        for name, value in sorted(command.environment.items())
    ]
    lines += [
        "ExecStart=" + " ".join(_quote(word, in_command=True) for word in command.words),
        "SuccessExitStatus=4",
        "Restart=on-failure",
        f"RestartPreventExitStatus={_FINAL}",
        "RestartSec=10min",
        "KillMode=mixed",
        "TimeoutStopSec=5min",
        "Nice=10",
        "IOSchedulingClass=best-effort",
        "IOSchedulingPriority=7",
    ]
    timer = [
        "[Unit]",
        f"Description=casfs: schedule of profile {command.profile}",
        "Documentation=man:casfs(1)",
        "",
        "[Timer]",
        f"OnCalendar={calendar.replace('%', '%%')}",
        "Persistent=true",
    ]
    if random_delay_s is not None:
        timer.append(f"RandomizedDelaySec={random_delay_s}s")
    timer += ["", "[Install]", "WantedBy=timers.target"]
    return Units("\n".join(lines) + "\n", "\n".join(timer) + "\n")


def _quote(word: str, in_command: bool) -> str:
    """Quote a word for a unit file: escape specifiers, variables and quotes."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    escaped = escaped.replace("\n", "\\n").replace("\t", "\\t")
    if in_command:
        escaped = escaped.replace("$", "$$")
    return escaped if _PLAIN_WORD.fullmatch(word) else f'"{escaped}"'
