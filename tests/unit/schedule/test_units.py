"""Units of systemd, verified by systemd itself."""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from casfs.errors import UsageError
from casfs.schedule.systemd import check_calendar
from casfs.schedule.units import ScheduledCommand, Units, render_units

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze"
)

ODD_WORDS = ["a b", "50%", "$HOME", 'say "hi"', "back\\slash", "é", "#x", ";", "it's", "a\nb", "{}"]


def units(
    words: list[str] | None = None,
    environment: dict[str, str] | None = None,
    calendar: str = "daily",
    random_delay_s: int | None = None,
    system: bool = True,
    needs_network: bool = True,
) -> Units:
    command = ScheduledCommand(
        "home",
        words or ["/bin/true", "run", "--scheduled", "home"],
        environment or {},
        needs_network,
    )
    return render_units(command, calendar, random_delay_s, system)


def verify(folder: Path, found: Units, *options: str) -> None:
    """Fail for anything that systemd has to say of the units."""
    (folder / "casfs-home.service").write_text(found.service)
    (folder / "casfs-home.timer").write_text(found.timer)
    done = subprocess.run(
        [
            "systemd-analyze",
            "verify",
            "--man=no",
            *options,
            "./casfs-home.service",
            "./casfs-home.timer",
        ],
        cwd=folder,
        env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


@needs_systemd
@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("delay_s", [None, 3600])
def test_systemd_accepts_the_units(tmp_path: Path, system: bool, delay_s: int | None) -> None:
    found = units(
        ["/bin/true", *ODD_WORDS],
        {"XDG_STATE_HOME": "/var/lib/a b%$", "B": "é"},
        "Mon..Fri *-*-* 02:30:00",
        delay_s,
        system,
    )
    verify(tmp_path, found, *([] if system else ["--user"]))


@needs_systemd
def test_systemd_refuses_a_unit_that_is_wrong(tmp_path: Path) -> None:
    found = units(calendar="every now and then")
    with pytest.raises(AssertionError):
        verify(tmp_path, found)


def parsed(text: str) -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None, strict=False)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read_string(text)
    return found


def test_a_timer_makes_up_for_missed_times_and_waits_a_random_while() -> None:
    timer = parsed(units(random_delay_s=900).timer)["Timer"]
    assert dict(timer) == {
        "OnCalendar": "daily",
        "Persistent": "true",
        "RandomizedDelaySec": "900s",
    }
    assert "RandomizedDelaySec" not in units().timer


def test_a_service_gives_way_to_others_and_is_started_again_only_when_put_off() -> None:
    service = parsed(units().service)["Service"]
    assert (service["Type"], service["Nice"], service["IOSchedulingPriority"]) == (
        "oneshot",
        "10",
        "7",
    )
    assert (service["Restart"], service["SuccessExitStatus"]) == ("on-failure", "4")
    final = service["RestartPreventExitStatus"].split()
    assert "75" not in final
    assert {"1", "2", "3", "5", "6", "130"} <= set(final)


def test_only_a_system_unit_that_needs_the_network_waits_for_it() -> None:
    assert "After=network-online.target" in units().service
    assert "network-online" not in units(system=False).service
    assert "network-online" not in units(needs_network=False).service


@needs_systemd
@pytest.mark.parametrize("expression", ["daily", "Mon..Fri 02:30", "*-*-* *:0/15"])
def test_a_calendar_expression_is_accepted(expression: str) -> None:
    check_calendar(expression)


@needs_systemd
@pytest.mark.parametrize(
    "expression", ["dayly", "25:00", "", " ", "daily\nExecStart=/bin/sh", "-x"]
)
def test_what_is_no_calendar_expression_is_refused(expression: str) -> None:
    with pytest.raises(UsageError, match="the schedule"):
        check_calendar(expression)


def test_words_reach_the_command_as_they_are(tmp_path: Path) -> None:
    """Compare with systemd's own reading, as far as a machine without its manager can ask for it."""
    found = units(["/bin/echo", *ODD_WORDS]).service
    line = next(line for line in found.splitlines() if line.startswith("ExecStart="))
    # Quotes and backslashes of systemd read like those of a shell; the rest is undone by hand.
    words = [
        word.replace("%%", "%").replace("$$", "$")
        for word in shlex.split(line.removeprefix("ExecStart=").replace("\\n", "\n"))
    ]
    assert words == ["/bin/echo", *ODD_WORDS]


def test_a_calendar_expression_is_left_to_systemd_where_it_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    check_calendar("daily")
    with pytest.raises(UsageError, match="the schedule"):
        check_calendar("daily\nPersistent=false")
