"""Schedules of profiles: under a real manager of systemd, and in a crontab."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import Casfs
from tests.support.user_manager import UserManager, missing_for_a_manager, running_user_manager
from tests.support.waiting import wait_until


@pytest.fixture
def config(casfs: Casfs, source: Path) -> Path:
    """A configuration whose profile has a schedule, and the repository that it names."""
    path = casfs.home / ".config" / "casfs" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(
        f'[repositories.nas]\nurl = "{casfs.where}"\n'
        f'[profiles.home]\nrepository = "nas"\nsources = ["{source}"]\n'
        'schedule = { calendar = "daily", random-delay = "30m" }\n'
        "hooks = { }\n"
    )
    path.chmod(0o600)
    casfs.init()
    return path


@pytest.fixture
def manager(casfs: Casfs, config: Path) -> Iterator[UserManager]:
    reason = missing_for_a_manager()
    if reason is not None:
        pytest.skip(reason)
    with running_user_manager(casfs.home) as found:
        yield found


class TestSystemd:
    def test_a_schedule_is_installed_run_shown_and_removed(
        self, casfs: Casfs, manager: UserManager, config: Path
    ) -> None:
        def run(*arguments: str, expect: int = 0) -> dict[str, object]:
            words = ("--json", "--user", "home")
            result = casfs.run("schedule", *arguments, *words, prefix=manager.prefix, expect=expect)
            return result.objects[-1]

        before = run("status")
        assert (before["installed"], before["next_run"], before["last_start"]) == (
            False,
            None,
            None,
        )

        installed = run("install")
        assert installed["scheduler"] == "systemd"
        units = casfs.home / ".config" / "systemd" / "user"
        assert installed["unit_files"] == [
            str(units / "casfs-home.service"),
            str(units / "casfs-home.timer"),
        ]
        assert manager.systemctl("is-enabled", "casfs-home.timer") == "enabled"
        waiting = run("status")
        assert (waiting["installed"], waiting["active"]) == (True, True)
        assert waiting["next_run"] is not None and waiting["last_exit"] is None

        manager.systemctl("start", "casfs-home.service")
        assert (
            manager.systemctl("show", "--value", "-p", "Result", "casfs-home.service") == "success"
        )
        done = run("status")
        assert (done["last_exit"], done["unit_result"]) == (0, "success")
        assert done["last_success"] is not None
        assert len(casfs.json("snapshots").of_type("snapshot")) == 1

        run("remove")
        assert list(units.glob("casfs-*")) == []
        assert run("status")["installed"] is False
        assert "no schedule installed" in str(run("remove", expect=1)["message"])

    def test_installing_again_changes_the_time(
        self, casfs: Casfs, manager: UserManager, config: Path
    ) -> None:
        for calendar, end in (("*-*-* 05:00:00", "05:00:00"), ("*-*-* 06:00:00", "06:00:00")):
            text = config.read_text()
            start = text.index("schedule")
            config.write_text(f'{text[:start]}schedule = "{calendar}"\n')
            casfs.run("schedule", "install", "--user", "home", prefix=manager.prefix)
            shown = casfs.run("schedule", "status", "--user", "--json", prefix=manager.prefix)
            assert end in str(shown.one("schedule")["next_run"])

    def test_a_run_that_is_put_off_is_started_again_and_one_that_failed_is_not(
        self, casfs: Casfs, manager: UserManager, config: Path
    ) -> None:
        casfs.run("schedule", "install", "--user", "home", prefix=manager.prefix)
        service = casfs.home / ".config" / "systemd" / "user" / "casfs-home.service"
        service.write_text(service.read_text().replace("RestartSec=10min", "RestartSec=100ms"))
        manager.systemctl("daemon-reload")
        # Another run holds the lock of the profile until its hook ends.
        go_on = casfs.home / "go-on"
        calls = casfs.home / "calls"
        waiting = f"while ! [ -e {go_on} ]; do sleep 0.05; done"
        config.write_text(
            config.read_text().replace(
                "hooks = { }", f"hooks = {{ before = '{waiting}; echo call >> {calls}; exit 9' }}"
            )
        )
        lock = casfs.home / ".local/state/casfs/profiles"
        first = casfs.start("run", "home")
        wait_until(lambda: bool(list(lock.glob("*.lock"))), "the first run has begun")
        manager.systemctl("start", "--no-block", "casfs-home.service")

        def restarts() -> int:
            return int(
                manager.systemctl("show", "--value", "-p", "NRestarts", "casfs-home.service")
            )

        wait_until(lambda: restarts() >= 2, "systemd has started the service again twice")
        go_on.touch()
        first.communicate(timeout=120)
        assert first.returncode == 1

        def ended() -> list[str]:
            names = "ExecMainStatus,SubState"
            return manager.systemctl(
                "show", "--value", f"--property={names}", "casfs-home.service"
            ).split()

        wait_until(lambda: ended() == ["1", "failed"], "the service has failed for good")
        manager.systemctl("start", "casfs-home.service")
        assert ended() == ["1", "failed"]
        assert calls.read_text() == "call\n" * 3


class TestCron:
    @pytest.fixture
    def crontab(self, casfs: Casfs, config: Path) -> Path:
        """A crontab of the test's own, kept by a program that answers as cron's does."""
        table = casfs.home / "table"
        program = casfs.home / "bin" / "crontab"
        program.parent.mkdir()
        program.write_text(
            f'#!/bin/sh\nif [ "$1" = -l ]; then cat {table} 2>/dev/null || '
            f'{{ echo "no crontab for me" >&2; exit 1; }}; else cat > {table}; fi\n'
        )
        program.chmod(0o755)
        return table

    def test_a_schedule_is_installed_shown_and_removed(self, casfs: Casfs, crontab: Path) -> None:
        path = {"PATH": f"{crontab.parent}/bin:{os.environ['PATH']}"}
        crontab.write_text("5 4 * * * /bin/true\n")

        def run(*arguments: str, expect: int = 0) -> dict[str, object]:
            words = ("--json", "--scheduler", "cron", "home")
            return casfs.run("schedule", *arguments, *words, env=path, expect=expect).objects[-1]

        assert run("install")["scheduler"] == "cron"
        lines = crontab.read_text().splitlines()
        assert lines[0] == "5 4 * * * /bin/true"
        assert lines[2].startswith("0 0 * * * ") and lines[2].endswith(" home")
        assert lines[3].startswith("17 * * * * ") and lines[3].endswith(" --if-missed")
        shown = run("status")
        assert (shown["installed"], shown["scheduler"]) == (True, "cron")
        assert "T00:00:00" in str(shown["next_run"])
        run("remove")
        assert crontab.read_text() == "5 4 * * * /bin/true\n"
        assert "no schedule installed" in str(run("remove", expect=1)["message"])

    def test_the_line_of_the_crontab_runs_the_profile(self, casfs: Casfs, crontab: Path) -> None:
        path = {"PATH": f"{crontab.parent}/bin:{os.environ['PATH']}"}
        casfs.run("schedule", "install", "--scheduler", "cron", "home", env=path)
        # cron gives a line to the shell with a percent sign for a line feed.
        lines = [
            line.split(None, 5)[5] for line in crontab.read_text().splitlines() if "nice" in line
        ]
        assert len(lines) == 2
        for line in lines:
            done = os.system(f"cd / && env -i {line.replace(chr(92) + '%', '%')}")
            assert done == 0
        assert len(casfs.json("snapshots").of_type("snapshot")) == 1


class TestPrint:
    def test_print_shows_the_units_and_writes_nothing(self, casfs: Casfs, config: Path) -> None:
        words = ("schedule", "install", "home", "--print", "--user", "--scheduler", "systemd")
        text = casfs.run(*words).text
        folder = casfs.home / ".config" / "systemd" / "user"
        assert f"# {folder}/casfs-home.service" in text
        assert f"# {folder}/casfs-home.timer" in text
        assert "OnCalendar=daily" in text and "RandomizedDelaySec=1800s" in text
        assert f"run --scheduled --config {config} home" in text
        assert not folder.exists()
        units = casfs.run(*words, "--json").of_type("unit")
        assert [unit["unit_file"].rpartition(".")[2] for unit in units] == ["service", "timer"]

    def test_a_profile_without_a_schedule_is_refused(self, casfs: Casfs, config: Path) -> None:
        text = config.read_text()
        config.write_text(text[: text.index("schedule")])
        casfs.refuses(
            "schedule",
            "install",
            "home",
            expect=2,
            mentions=["has no schedule", 'schedule = "daily"'],
        )
        casfs.refuses("schedule", "status", mentions=["no profile has a schedule"])

    @pytest.mark.parametrize("scheduler", ["systemd", "cron"])
    def test_a_time_that_cannot_be_meant_is_refused(
        self, casfs: Casfs, config: Path, scheduler: str
    ) -> None:
        config.write_text(config.read_text().replace('"daily"', '"dayly"'))
        casfs.refuses(
            *("schedule", "install", "home", "--print", "--scheduler", scheduler),
            expect=2,
            mentions=["the schedule 'dayly'"],
        )

    def test_a_name_that_leads_elsewhere_removes_nothing(self, casfs: Casfs, config: Path) -> None:
        casfs.refuses(
            "schedule", "remove", "../../x", expect=2, mentions=["is not the name of a profile"]
        )
