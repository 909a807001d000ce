"""The metrics file, read back by Prometheus's own parser."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from casfs.errors import StorageError
from casfs.run.metrics import metrics_text, profile_metrics, write_metrics
from casfs.run.state import BackupNumbers, ProfileState, RepositoryNumbers, StepRecord

COMPLETE = ProfileState(
    profile="home",
    last_start_s=100.5,
    last_end_s=200.0,
    last_success_s=200.0,
    last_exit=4,
    last_seconds=99.5,
    failures_in_a_row=2,
    damage=3,
    steps={
        "backup": StepRecord(last_run_s=101.0, last_success_s=101.0, exit=4, seconds=9.0),
        "mirror cloud": StepRecord(last_run_s=150.0, exit=1, seconds=1.0),
    },
    backup=BackupNumbers(
        time_s=101.0,
        snapshot="ab",
        files=10,
        bytes=2**60,
        added_bytes=7,
        flagged=1,
        unreadable=2,
        vanished=3,
    ),
    repository=RepositoryNumbers(
        time_s=200.0, packs=5, bytes=6, unverified_packs=1, oldest_verification_s=50.0
    ),
)


def samples(state: ProfileState, repository: str = "nas") -> dict[str, float]:
    """Return every sample of the file by its name and its labels but for those of the profile."""
    found = {}
    for family in text_string_to_metric_families(metrics_text(state, repository)):
        assert (family.type, bool(family.documentation)) == ("gauge", True)
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("profile"), labels.pop("repository")) == (state.profile, repository)
            name = " ".join([sample.name.removeprefix("casfs_"), *labels.values()])
            assert name not in found
            found[name] = sample.value
    return found


def test_a_complete_record_has_every_metric() -> None:
    found = samples(COMPLETE)
    assert found == {
        "run_last_start_timestamp_seconds": 100.5,
        "run_last_end_timestamp_seconds": 200.0,
        "run_last_success_timestamp_seconds": 200.0,
        "run_exit_code": 4,
        "run_duration_seconds": 99.5,
        "run_consecutive_failures": 2,
        "step_last_run_timestamp_seconds backup": 101.0,
        "step_last_run_timestamp_seconds mirror cloud": 150.0,
        "step_last_success_timestamp_seconds backup": 101.0,
        "step_exit_code backup": 4,
        "step_exit_code mirror cloud": 1,
        "step_duration_seconds backup": 9.0,
        "step_duration_seconds mirror cloud": 1.0,
        "backup_timestamp_seconds": 101.0,
        "backup_files": 10,
        "backup_bytes": 2**60,
        "backup_added_bytes": 7,
        "backup_flagged_files": 1,
        "backup_unreadable_files": 2,
        "backup_vanished_files": 3,
        "check_damage": 3,
        "repository_bytes": 6,
        "repository_packs": 5,
        "repository_unverified_packs": 1,
        "repository_oldest_verification_timestamp_seconds": 50.0,
    }


def test_what_is_not_known_yet_is_left_out() -> None:
    assert set(samples(ProfileState(profile="home"))) == {
        "run_duration_seconds",
        "run_consecutive_failures",
    }


def test_labels_are_escaped() -> None:
    state = ProfileState(profile='a"b\\c\nd')
    assert samples(state, 'x"y')["run_consecutive_failures"] == 0


def test_names_follow_the_conventions_of_prometheus() -> None:
    for metric in profile_metrics(COMPLETE):
        assert re.fullmatch(r"casfs_[a-z_]+", metric.name)
        assert metric.help.endswith(".") and "\n" not in metric.help
        if "timestamp" in metric.name or "duration" in metric.name:
            assert metric.name.endswith("_seconds")


def test_the_file_is_replaced_and_every_user_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "casfs.prom"
    path.write_text("old")
    path.chmod(0o600)
    before = path.stat().st_ino
    write_metrics(path, "new\n")
    assert path.read_text() == "new\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert path.stat().st_ino != before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder.prom").mkdir()
    for path in (tmp_path / "missing" / "x.prom", tmp_path / "folder.prom"):
        with pytest.raises(StorageError, match="write the metrics file"):
            write_metrics(path, "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.prom"]
