"""Lines of a crontab, and what a crontab is before and after."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from casfs.errors import CasfsError
from casfs.schedule.calendar import parse_calendar
from casfs.schedule.cron import has_lines, read_crontab, render_lines, with_lines, write_crontab
from casfs.schedule.units import ScheduledCommand

COMMAND = ScheduledCommand("home", ["/usr/bin/casfs", "run", "--scheduled", "home"], {}, False)
OTHERS = "MAILTO=anna\n# my own\n5 4 * * * /bin/true\n"


def lines(profile: str = "home", *more: str) -> str:
    command = ScheduledCommand(profile, [*COMMAND.words, *more], {"A": "b c"}, False)
    return render_lines(command, parse_calendar("daily"))


def test_a_profile_has_a_line_for_its_time_and_one_that_makes_up_for_it() -> None:
    assert lines().splitlines() == [
        "# casfs profile home: begin",
        "0 0 * * * A='b c' nice -n 10 /usr/bin/casfs run --scheduled home",
        "17 * * * * A='b c' nice -n 10 /usr/bin/casfs run --scheduled home --if-missed",
        "# casfs profile home: end",
    ]


def test_the_shell_reads_back_every_word_as_it_was(tmp_path: Path) -> None:
    odd = ["a b", "50%", "$HOME", 'say "hi"', "it's", ";"]
    command = ScheduledCommand("home", ["/usr/bin/printf", r"%s\n", *odd], {"A": "x"}, False)
    line = render_lines(command, parse_calendar("daily")).splitlines()[1]
    # cron takes a percent sign that is not escaped for a line feed.
    text = line.split(None, 5)[5]
    assert "%" not in text.replace("\\%", "")
    done = subprocess.run(
        ["/bin/sh", "-c", text.replace("\\%", "%")], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == odd


def test_lines_are_added_replaced_and_removed_and_others_stay() -> None:
    one = with_lines(OTHERS, "home", lines())
    assert one == OTHERS + lines()
    both = with_lines(one, "etc", lines("etc"))
    assert has_lines(both, "home") and has_lines(both, "etc")
    again = with_lines(both, "home", lines("home", "-x"))
    assert again == OTHERS + lines("etc") + lines("home", "-x")
    assert with_lines(with_lines(again, "home", ""), "etc", "") == OTHERS
    assert not has_lines(OTHERS, "home")


def test_a_profile_whose_name_begins_another_one_stays() -> None:
    both = with_lines(lines("home"), "home-2", lines("home-2"))
    assert with_lines(both, "home", "") == lines("home-2")


class TestCrontab:
    @pytest.fixture
    def crontab(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A crontab of the test's own, kept by a program that answers as cron's does."""
        table = tmp_path / "table"
        program = tmp_path / "bin" / "crontab"
        program.parent.mkdir()
        program.write_text(
            "#!/bin/sh\n"
            f'if [ "$1" = -l ]; then [ -e {table} ] || {{ echo "no crontab for x" >&2; exit 1; }}; '
            f"cat {table}; "
            f'else [ ! -e {tmp_path}/full ] || {{ echo "no space left" >&2; exit 1; }}; '
            f"cat > {table}; fi\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        return table

    def test_no_crontab_is_an_empty_one(self, crontab: Path) -> None:
        assert read_crontab() == ""
        write_crontab(OTHERS)
        assert (crontab.read_text(), read_crontab()) == (OTHERS, OTHERS)

    def test_a_crontab_that_cannot_be_written_is_an_error(
        self, crontab: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "full").touch()
        with pytest.raises(CasfsError, match="no space left"):
            write_crontab(OTHERS)

    def test_a_machine_without_cron_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(CasfsError, match="install cron"):
            read_crontab()
