"""When a scheduled run is put off, and which names are offered for completion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from casfs.cli.app import casfs, run
from casfs.schedule import conditions

CONFIG = """\
[repositories.local]
url = "{folder}/repository"
[repositories.far]
url = "sftp://backup@nas/casfs"
[repositories.near]
url = "sftp://backup@localhost/casfs"
[profiles.local]
repository = "local"
sources = ["{folder}"]
[profiles.far]
repository = "far"
sources = ["{folder}"]
[profiles.near]
repository = "near"
sources = ["{folder}"]
[profiles.mains]
repository = "local"
sources = ["{folder}"]
schedule = {{ calendar = "daily", on-battery = true }}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(folder=tmp_path))
    path.chmod(0o600)
    monkeypatch.setenv("CASFS_CONFIG", str(path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The profiles that were run, none of them really."""
    names: list[str] = []

    def run_profile(job: object, monitor: object) -> object:
        names.append(getattr(job, "name", ""))
        raise KeyboardInterrupt

    monkeypatch.setattr("casfs.run.profile_run.run_profile", run_profile)
    return names


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool, bool], None]:
    def set_conditions(on_battery: bool, network: bool) -> None:
        monkeypatch.setattr(conditions, "is_on_battery", lambda: on_battery)
        monkeypatch.setattr(conditions, "has_network", lambda: network)

    return set_conditions


@pytest.mark.parametrize(
    ("profile", "on_battery", "network", "reason"),
    [
        ("local", False, False, None),
        ("local", True, True, "runs on battery"),
        ("mains", True, True, None),
        ("far", False, True, None),
        ("far", False, False, "there is no network"),
        ("near", False, False, None),
    ],
)
def test_a_scheduled_run_is_put_off_on_battery_and_without_the_network_it_needs(
    config: Path,
    machine: Callable[[bool, bool], None],
    started: list[str],
    capsys: pytest.CaptureFixture[str],
    profile: str,
    on_battery: bool,
    network: bool,
    reason: str | None,
) -> None:
    machine(on_battery, network)
    code = run(["run", "--scheduled", profile])
    out = capsys.readouterr().out
    if reason is None:
        assert (code, started, out) == (130, [profile], "")
    else:
        assert (code, started) == (75, [])
        assert reason in out


def test_a_person_is_not_put_off(
    config: Path, machine: Callable[[bool, bool], None], started: list[str]
) -> None:
    machine(True, False)
    assert run(["run", "far"]) == 130
    assert started == ["far"]


def completions(arguments: list[str], incomplete: str) -> list[str]:
    shell = ShellComplete(casfs, {}, "casfs", "_CASFS_COMPLETE")
    return [item.value for item in shell.get_completions(arguments, incomplete)]


@pytest.mark.parametrize("arguments", [["run"], ["schedule", "install"], ["schedule", "status"]])
def test_profiles_are_completed(config: Path, arguments: list[str]) -> None:
    assert completions(arguments, "") == ["far", "local", "mains", "near"]
    assert completions(arguments, "m") == ["mains"]


def test_profiles_of_the_file_that_is_named_are_completed(config: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(CONFIG.format(folder=tmp_path).replace("profiles.far", "profiles.other"))
    other.chmod(0o600)
    assert completions(["run", "--config", str(other)], "o") == ["other"]


def test_a_broken_configuration_completes_nothing(config: Path) -> None:
    config.write_text("x = \n")
    assert completions(["run"], "") == []
