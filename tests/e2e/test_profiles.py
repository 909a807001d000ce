"""Nights of a profile, end to end: what runs, who hears of it, and what the numbers say afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.cli import Casfs, finish
from tests.support.mounts import small_disk
from tests.support.night import Night
from tests.support.ping_server import serving_pings
from tests.support.scripted_source import ScriptedSource, scripted_source
from tests.support.waiting import wait_until

DASHBOARD = Path(__file__).parent.parent.parent / "docs" / "grafana-dashboard.json"
MIB = 1024 * 1024
SIZE = 100_000
ALWAYS_REWRITTEN = {"opening": 0, "reading": 1, "where": "between", "change": "rewrite"}


@pytest.fixture
def night(casfs: Casfs, tmp_path: Path, source: Path) -> Iterator[Night]:
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "letter").write_text("Dear Anna")
    casfs.init()
    with serving_pings() as pings:
        night = Night(casfs, tmp_path, pings, [source, documents])
        night.configure()
        yield night


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedSource]:
    with scripted_source(tmp_path_factory.mktemp("scripted") / "mnt") as source:
        yield source


def torn() -> dict[str, Any]:
    return {
        "seed": "old",
        "size": SIZE,
        "rules": [{**ALWAYS_REWRITTEN, "size": SIZE, "seed": "v "}],
    }


def test_a_quiet_night_does_every_step_and_says_so_everywhere(night: Night) -> None:
    result = night.run()
    assert night.steps(result) == dict.fromkeys(["backup", "forget", "prune", "check"], "0")
    run = result.one("run")
    (snapshot,) = night.casfs.json("snapshots").of_type("snapshot")
    assert (run["snapshot"], snapshot["tags"]) == (snapshot["id"], ["home", "profile:home"])
    assert night.calls == ["before", "after", "finally"]
    summary = json.loads((night.folder / "after.json").read_text())
    assert (summary["type"], summary["snapshot"], summary["exit"]) == ("run", snapshot["id"], 0)
    assert night.pings.paths == ["/uuid/start", "/uuid"]
    assert "backup: done" in night.pings.requests[-1][2]
    assert not (night.folder / "mail").exists()
    metrics = night.metrics
    assert metrics["run_exit_code"] == 0
    assert (
        metrics["run_last_success_timestamp_seconds"] == metrics["run_last_end_timestamp_seconds"]
    )
    assert metrics["backup_files"] == snapshot["files"]
    assert metrics["backup_bytes"] == snapshot["bytes"]
    assert metrics["check_damage"] == 0
    assert metrics["repository_packs"] >= 1
    assert metrics["repository_unverified_packs"] == 0


def test_people_read_a_line_for_each_step_and_one_for_the_run(night: Night) -> None:
    result = night.casfs.run("run", "--config", night.config, "home")
    lines = result.text.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == ["backup", "forget", "prune", "check"]
    assert lines[-1].startswith("casfs profile home on ")
    assert "succeeded (exit 0)" in lines[-1]


@pytest.mark.fuse
def test_a_torn_file_is_a_warning(night: Night, scripted: ScriptedSource) -> None:
    night.sources[0] = scripted.scene({"torn": torn(), "still": {"seed": "s", "size": 9}})
    night.configure()
    result = night.run(expect=4)
    assert night.steps(result)["backup"] == "4"
    assert night.calls == ["before", "after", "finally"]
    assert night.pings.paths == ["/uuid/start", "/uuid"]
    mail = (night.folder / "mail").read_text()
    assert "succeeded with warnings (exit 4)" in mail
    assert "torn: it changed while it was read" in mail
    assert (night.metrics["run_exit_code"], night.metrics["backup_flagged_files"]) == (4, 1)
    assert night.metrics["run_consecutive_failures"] == 0


@pytest.mark.fuse
def test_an_unreadable_file_fails_the_run_and_outranks_a_torn_one(
    night: Night, scripted: ScriptedSource
) -> None:
    broken = torn()
    broken["rules"][0]["change"] = "read error"
    night.sources[0] = scripted.scene({"broken": broken, "torn": torn()})
    night.configure()
    result = night.run(expect=3)
    assert night.steps(result)["forget"] == "0"
    assert night.calls == ["before", "failure", "finally"]
    assert night.pings.paths == ["/uuid/start", "/uuid/fail"]
    assert "broken: it cannot be read" in night.pings.requests[-1][2]
    assert night.metrics["backup_unreadable_files"] == 1
    assert night.metrics["run_consecutive_failures"] == 1


def test_nothing_is_forgotten_while_a_source_is_missing(night: Night) -> None:
    for _ in range(2):
        night.run()
    night.sources[1].rename(night.folder / "elsewhere")
    for _ in range(3):
        result = night.run(expect=3)
        assert night.steps(result)["forget"] == "skipped"
    assert len(night.casfs.json("snapshots").of_type("snapshot")) == 5
    (night.folder / "elsewhere").rename(night.sources[1])
    night.run()
    found = night.casfs.json("snapshots").of_type("snapshot")
    # Two whole ones, and the last two of those without the source, which take no place of a whole one.
    assert sorted(len(snapshot["paths"]) for snapshot in found) == [1, 1, 2, 2]


def test_a_failing_before_hook_stops_the_run_and_still_notifies(night: Night) -> None:
    night.run()
    before = night.metrics
    night.configure(before="exit 7")
    result = night.run(expect=1)
    assert set(night.steps(result).values()) == {"skipped"}
    assert "the before hook failed with exit 7" in result.complaint
    assert night.calls[3:] == ["before", "failure", "finally"]
    assert night.pings.paths[2:] == ["/uuid/start", "/uuid/fail"]
    assert "the before hook failed with exit 7" in (night.folder / "mail").read_text()
    after = night.metrics
    assert after["run_exit_code"] == 1
    for kept in ("run_last_success_timestamp_seconds", "backup_files", "backup_timestamp_seconds"):
        assert after[kept] == before[kept]
    assert len(night.casfs.json("snapshots").of_type("snapshot")) == 1


def test_a_mirror_holds_what_the_night_published(night: Night, tmp_path: Path) -> None:
    copy = tmp_path / "usb" / "casfs"
    second = f'[repositories.usb]\nurl = "{copy}"'
    night.configure('mirror-to = ["usb"]', repository=second)
    result = night.run()
    assert night.steps(result)["mirror"] == "0"
    (mirror,) = [line for line in result.of_type("step") if line["step"] == "mirror"]
    assert (mirror["mirror_to"], mirror["result"]["damage"]) == ("usb", 0)
    by_name = ("--config", night.config, "-r", "usb")
    (snapshot,) = night.casfs.json("snapshots", *by_name).of_type("snapshot")
    assert snapshot["id"] == result.one("run")["snapshot"]
    night.casfs.run("check", "--read-data", *by_name)


def test_the_dashboard_asks_for_metrics_and_labels_that_a_night_writes(
    night: Night, tmp_path: Path
) -> None:
    night.configure('mirror-to = ["usb"]', repository=f'[repositories.usb]\nurl = "{tmp_path}/usb"')
    night.run()
    families = text_string_to_metric_families((tmp_path / "casfs.prom").read_text())
    labels: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > 15
    for expression in expressions:
        for name, selectors in re.findall(r"(casfs_\w+)(?:\{([^}]*)\})?", expression):
            assert name in labels, expression
            assert set(re.findall(r"(\w+)\s*[=!]~?\"", selectors)) <= labels[name], expression
    variables = [one["definition"] for one in dashboard["templating"]["list"][1:]]
    for metric, label in re.findall(r"label_values\((\w+), (\w+)\)", " ".join(variables)):
        assert label in labels[metric]


def test_a_mirror_that_cannot_be_written_fails_the_run_and_no_other_step(
    night: Night, tmp_path: Path
) -> None:
    (tmp_path / "usb").touch()
    second = f'[repositories.usb]\nurl = "{tmp_path}/usb"'
    night.configure('mirror-to = ["usb"]', repository=second)
    result = night.run(expect=1)
    assert night.steps(result) == {
        **dict.fromkeys(["backup", "forget", "prune", "check"], "0"),
        "mirror": "1",
    }
    assert "mirror to usb: failed" in (night.folder / "mail").read_text()
    assert night.pings.paths[-1] == "/uuid/fail"
    assert len(night.casfs.json("snapshots").of_type("snapshot")) == 1


@pytest.mark.usefixtures("superuser")
def test_a_full_disk_fails_the_backup_while_prune_and_check_go_on(
    night: Night, tmp_path: Path
) -> None:
    heavy = night.sources[1] / "heavy"
    with small_disk(tmp_path, 64 * MIB) as disk:
        night.casfs = night.casfs.at(disk / "repository").init()
        night.configure()
        night.run()
        before = night.metrics
        heavy.write_bytes(os.urandom(96 * MIB))
        night.age("prune", 8)
        night.age("check", 2)
        result = night.run(expect=1)
        assert night.steps(result) == {
            "backup": "1",
            "forget": "skipped",
            "prune": "0",
            "check": "0",
        }
        assert "no space left" in night.pings.requests[-1][2].lower()
        assert night.pings.paths[-1] == "/uuid/fail"
        for kept in ("backup_files", "backup_bytes", "run_last_success_timestamp_seconds"):
            assert night.metrics[kept] == before[kept]
        assert night.metrics["run_consecutive_failures"] == 1
        heavy.unlink()
        night.run()
        assert night.metrics["run_consecutive_failures"] == 0


def test_damage_is_the_exit_code_and_stays_until_it_is_repaired(night: Night) -> None:
    night.run()
    pack = max(
        (night.folder / "repository/packs").glob("*/*"), key=lambda path: path.stat().st_size
    )
    pack.chmod(0o600)
    intact = pack.read_bytes()
    pack.write_bytes(intact[:100] + bytes([intact[100] ^ 1]) + intact[101:])
    night.configure('exclude = ["nothing"]')
    night.age("check", 40)
    night.config.write_text(
        night.config.read_text().replace('older-than = "30d"', "read-data = true")
    )
    for _ in range(2):
        result = night.run(expect=5)
        assert night.steps(result)["check"] == "5"
        assert night.metrics["check_damage"] >= 1
        assert night.pings.paths[-1] == "/uuid/fail"
    pack.write_bytes(intact)
    night.run()
    assert night.metrics["check_damage"] == 0


def test_a_check_that_was_missed_is_made_up_for(night: Night) -> None:
    night.run()
    assert night.steps(night.run())["check"] == "not due"
    night.age("check", 2)
    assert night.steps(night.run())["check"] == "0"
    assert night.steps(night.run())["check"] == "not due"


def test_a_second_run_at_once_is_refused_and_disturbs_nothing(night: Night) -> None:
    go_on = night.folder / "go-on"
    os.mkfifo(go_on)
    night.configure(before=f"cat {go_on}")
    first = night.casfs.start("run", "--config", night.config, "--json", "home")
    wait_until(lambda: night.calls == ["before"], "the first run is in its hook")
    second = night.casfs.run("run", "--config", night.config, "home", expect=6)
    assert "profile home is running already in process" in second.complaint
    put_off = night.run("--scheduled", expect=75)
    assert put_off.one("put_off")["exit"] == 75
    assert night.pings.paths == ["/uuid/start"]
    go_on.write_bytes(b"")
    assert finish(first).exit == 0
    assert night.pings.paths == ["/uuid/start", "/uuid"]


def test_a_terminated_run_ends_its_hook_and_notifies(night: Night) -> None:
    night.configure(before=f"echo $$ > {night.folder}/pid; exec sleep 1000")
    run = night.casfs.start("run", "--config", night.config, "--json", "home")
    pid = night.folder / "pid"
    wait_until(lambda: pid.exists() and bool(pid.read_text()), "the hook runs")
    run.send_signal(signal.SIGTERM)
    result = finish(run)
    assert result.exit == 130
    night.require_reports(result)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert night.calls == ["before", "failure", "finally"]
    assert night.pings.paths == ["/uuid/start", "/uuid/fail"]
    assert night.metrics["run_exit_code"] == 130


def test_a_run_goes_on_when_nothing_reads_its_output(night: Night) -> None:
    run = night.casfs.start("run", "--config", night.config, "home")
    assert run.stdout is not None and run.stderr is not None
    run.stdout.close()
    err = run.stderr.read()
    run.stderr.close()
    assert (run.wait(timeout=120), err) == (0, b"")
    assert night.pings.paths == ["/uuid/start", "/uuid"]
    assert night.metrics["run_exit_code"] == 0


def test_a_missed_time_is_made_up_for_once(night: Night) -> None:
    night.configure('schedule = "daily"')
    assert night.run("--if-missed").one("run")["exit"] == 0
    assert night.run("--if-missed").objects == []


def test_a_dry_run_lists_what_is_due_and_does_nothing(night: Night) -> None:
    lines = night.run("--dry-run").of_type("step")
    assert [line["step"] for line in lines] == ["backup", "forget", "prune", "check"]
    assert all(line["due"] for line in lines)
    assert night.casfs.json("snapshots").objects == []
    assert (night.calls, night.pings.paths) == ([], [])


def test_a_profile_forgets_only_snapshots_of_its_own(night: Night) -> None:
    night.casfs.backup(night.sources[0], "--tag", "home")
    night.casfs.backup(*night.sources, "--tag", "other")
    night.casfs.backup(*night.sources, "--tag", "profile:home", "--host", "another")
    by_hand = night.casfs.backup(*night.sources, "--tag", "home")["id"]
    for _ in range(4):
        night.run()
    found = night.casfs.json("snapshots").of_type("snapshot")
    assert len(found) == 4 + 2
    assert by_hand in [snapshot["id"] for snapshot in found]
    assert len(night.casfs.json("snapshots", "--tag", "profile:home").objects) == 1 + 2


def test_an_encrypted_repository_is_opened_by_what_the_configuration_names(
    night: Night, tmp_path: Path
) -> None:
    night.casfs = night.casfs.beside("encrypted")
    encrypted = night.casfs.where
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("correct horse\n")
    night.configure(repository=f'passphrase-command = "cat {passphrase}"')
    by_name = ("--config", night.config, "-r", "nas")
    made = night.casfs.at(None).json("init", *by_name).one("repository")
    assert (made["address"], made["encrypted"]) == (encrypted, True)
    # What the environment names is for another repository.
    night.run(env={"CASFS_PASSPHRASE_FILE": "/nowhere"})
    (snapshot,) = night.casfs.at(None).json("snapshots", *by_name).of_type("snapshot")
    assert snapshot["files"] > 0
    refused = night.casfs.run("ls", "latest", expect=None)
    assert refused.exit != 0


def test_a_repository_whose_recipients_are_others_is_not_written_to(
    night: Night, tmp_path: Path
) -> None:
    keys = {}
    for name in ("ours", "theirs"):
        pyrage = pytest.importorskip("pyrage")
        identity = pyrage.x25519.Identity.generate()
        (tmp_path / name).write_text(f"{identity}\n")
        keys[name] = str(identity.to_public())
    recipients = tmp_path / "recipients"
    recipients.write_text(keys["ours"] + "\n")
    night.casfs = night.casfs.beside("encrypted")
    by_name = ("--config", night.config, "-r", "nas")
    night.configure(repository=f'identity-file = "{tmp_path}/ours"')
    refused = night.casfs.run("init", *by_name, expect=2)
    assert "names an identity-file for this repository, but no recipient" in refused.complaint
    night.configure(
        repository=f'identity-file = "{tmp_path}/ours"\nrecipients-file = "{recipients}"'
    )
    assert night.casfs.json("init", *by_name).one("repository")["encrypted"]
    night.run()
    recipients.write_text(keys["theirs"] + "\n")
    result = night.run(expect=1)
    assert night.steps(result)["backup"] == "1"
    assert len(night.casfs.json("snapshots", *by_name).of_type("snapshot")) == 1


def test_a_name_of_the_configuration_goes_before_a_folder_of_that_name(
    night: Night,
) -> None:
    night.casfs = night.casfs.at(None)
    named = night.casfs.json("snapshots", "--config", night.config, "-r", "nas")
    assert named.objects == []
    missing = night.casfs.run("snapshots", "--config", night.config, "-r", "./nas", expect=1)
    assert "there is no repository in" in missing.complaint


class TestConfiguration:
    def test_a_wrong_key_is_refused_with_file_line_and_key(self, night: Night) -> None:
        night.configure("exclude-cache = true")
        number = len(night.config.read_text().splitlines())
        for verb in (("run", "home"), ("config", "show"), ("schedule", "status")):
            result = night.casfs.run(*verb, "--config", night.config, expect=2)
            assert result.complaints == [
                f"casfs: {night.config}:{number}: profiles.home.exclude-cache: unknown key; "
                "did you mean exclude-caches?"
            ]

    def test_show_prints_each_value_with_its_place(self, night: Night) -> None:
        result = night.casfs.run("config", "show", "--config", night.config)
        assert "[profiles.home]" in result.text
        lines = [" ".join(line.split()) for line in result.text.splitlines()]
        assert f'prune-every = "7d" # {night.config}:10' in lines
        assert "exclude-caches = false # default" in lines
        assert "uuid" not in result.text
        values = night.casfs.json("config", "show", "--config", night.config).of_type("value")
        (keep,) = [value for value in values if value["setting"] == "keep.last"]
        assert (keep["value"], keep["line"], keep["file"]) == (2, 9, str(night.config))
        (host,) = [value for value in values if value["setting"] == "host"]
        assert (host["value"], host["line"], host["file"]) == (None, None, None)

    def test_no_configuration_and_no_profile_are_said_plainly(self, night: Night) -> None:
        casfs = night.casfs.at(None)
        casfs.refuses("run", "home", mentions=["no configuration file exists", ".config/casfs"])
        casfs.refuses("config", "show", mentions=["no configuration file exists"])
        casfs.refuses(
            "run", "hom", "--config", night.config, mentions=["no profile 'hom'", "there are: home"]
        )
        casfs.refuses("run", "home", "--config", "/nowhere", mentions=["does not exist"])

    def test_a_file_that_others_can_write_runs_nothing(self, night: Night) -> None:
        night.config.chmod(0o666)
        night.casfs.refuses(
            "run", "home", "--config", night.config, expect=2, mentions=["chmod go-w"]
        )
        assert night.calls == []

    def test_run_takes_no_repository_of_its_own(self, night: Night) -> None:
        night.casfs.run("-r", "nas", "run", "--config", night.config, "home", expect=2)
