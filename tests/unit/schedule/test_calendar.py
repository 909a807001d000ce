"""Calendar expressions that cron can express, compared with systemd's own reading of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import datetime

import pytest

from casfs.errors import UsageError
from casfs.schedule.calendar import parse_calendar

FIELDS = {
    "hourly": "0 * * * *",
    "daily": "0 0 * * *",
    "weekly": "0 0 * * 1",
    "monthly": "0 0 1 * *",
    "quarterly": "0 0 1 1,4,7,10 *",
    "semiannually": "0 0 1 1,7 *",
    "yearly": "0 0 1 1 *",
    "annually": "0 0 1 1 *",
    "02:30": "30 2 * * *",
    "*-*-* 4:05": "5 4 * * *",
    "*-*-* 04:05:00": "5 4 * * *",
    "*:15": "15 * * * *",
    "Mon..Fri 02:30": "30 2 * * 1,2,3,4,5",
    "Sat,Sun *-*-* 04:00:00": "0 4 * * 6,0",
    "wednesday": "0 0 * * 3",
    "*-*-01 03:00": "0 3 1 * *",
    "*-02-29 03:00": "0 3 29 2 *",
}


@pytest.mark.parametrize("expression", FIELDS)
def test_an_expression_has_the_fields_of_a_crontab(expression: str) -> None:
    assert parse_calendar(expression).cron_fields() == FIELDS[expression]


@pytest.mark.parametrize("expression", FIELDS)
@pytest.mark.parametrize("moment", ["2026-01-01 00:00:00", "2027-03-28 02:30:00"])
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_the_next_time_is_the_one_that_systemd_computes(expression: str, moment: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "calendar", f"--base-time={moment}", "--", expression],
        capture_output=True,
        text=True,
        check=True,
        env={"TZ": "UTC", "LC_ALL": "C", "PATH": "/usr/bin:/bin"},
    )
    found = re.search(r"Next elapse: \w+ (\S+ \S+) UTC", done.stdout)
    assert found is not None, done.stdout
    expected = datetime.fromisoformat(found[1])
    assert parse_calendar(expression).first_after(datetime.fromisoformat(moment)) == expected


@pytest.mark.parametrize("expression", FIELDS)
def test_a_time_lies_between_the_last_one_and_the_next_one(expression: str) -> None:
    times = parse_calendar(expression)
    moment = datetime(2026, 11, 28, 3, 26, 37)
    last = times.last_before(moment)
    following = times.first_after(moment)
    assert last is not None and following is not None
    assert last <= moment < following
    assert times.first_after(last) == following
    assert times.last_before(following) == following
    assert times.last_before(last) == last


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "every day",
        "minutely",
        "Mon *-*-01 03:00",
        "*-*-32",
        "*-02-30 03:00",
        "25:00",
        "00:60",
        "*:0/15",
        "2026-01-01 00:00",
        "Foo 03:00",
        "Fri..Mon 01:00",
        "03:00 Europe/Berlin",
        "03:00:30",
    ],
)
def test_what_cron_cannot_express_is_refused(expression: str) -> None:
    with pytest.raises(UsageError, match="cannot be expressed in a crontab"):
        parse_calendar(expression)
