"""The sequence of a run, with verbs that end as the test says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from casfs.config.profiles import CheckPlan, Hooks, Keep, Notification, Profile
from casfs.config.values import AbsolutePath, Command, Duration, PingUrl
from casfs.errors import LockedError, StorageError
from casfs.run.due import PlannedStep
from casfs.run.outcome import JsonObject, Outcome, RunSummary, StepOutcome, StepStatus
from casfs.run.processes import VerbEnd, VerbOutput
from casfs.run.profile_run import ProfileJob, Verbs, run_profile
from casfs.run.state import ProfileState
from tests.support.ping_server import PingServer, serving_pings

SNAPSHOT: JsonObject = {
    "type": "snapshot",
    "id": "ab" * 32,
    "files": 3,
    "bytes": 1000,
    "new_bytes": 10,
    "flagged": 0,
    "unreadable": 0,
    "vanished": 0,
}
RESULTS: dict[str, JsonObject] = {
    "backup": SNAPSHOT,
    "forget": {"type": "summary", "forgotten": 1, "kept": 2},
    "prune": {"type": "prune", "freed_bytes": 5},
    "check": {"type": "summary", "damage": 0, "read_bytes": 7},
    "stats": {
        "type": "stats",
        "packs": 4,
        "pack_bytes": 500,
        "unverified_packs": 1,
        "oldest_verification": "2026-01-01T00:00:00+00:00",
    },
}
PROFILE = Profile(
    repository="nas",
    sources=(AbsolutePath("/home"), AbsolutePath("/etc")),
    keep=Keep(daily=7),
    prune_every=Duration("7d"),
    check=CheckPlan(every=Duration("1d")),
    mirror_to=("cloud",),
)
ALL = ["backup", "forget", "prune", "check", "mirror"]
DAY = 86_400.0


class ScriptedVerbs:
    """Verbs that print what RESULTS holds and end with the exit codes that a test sets."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        self.problems: list[JsonObject] = []
        self.interrupted: set[str] = set()
        self.ran: list[str] = []
        self.now_s = 1_800_000_000.0
        self.during: Callable[[str], None] = lambda verb: None

    def run(
        self, verb: Sequence[str], on_problem: Callable[[JsonObject], None] | None = None
    ) -> VerbEnd:
        name = verb[0]
        self.ran.append(name)
        self.during(name)
        code = self.codes.get(name, 0)
        output = VerbOutput(on_problem)
        if on_problem is not None:
            for problem in self.problems:
                output.add_line(json.dumps({"type": "problem", **problem}).encode())
        if code in (0, 3, 4, 5):
            output.result = RESULTS.get(name, {"type": name})
            if code == 5:
                output.result = {**output.result, "damage": 2}
        else:
            output.error = f"{name} did not work"
        if name in self.interrupted:
            return VerbEnd(130, output, self.now_s, 1.0, True)
        return VerbEnd(code, output, self.now_s, 1.0)


class Job(ProfileJob):
    """A job whose verbs are scripted."""

    __slots__ = ("scripted",)

    def verbs(self, lock_fd: int) -> Verbs:
        return self.scripted  # type: ignore[attr-defined,no-any-return]


class Silent:
    def step_begins(self, step: PlannedStep) -> None:
        pass

    def step_ends(self, outcome: StepOutcome) -> None:
        pass


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def verbs() -> ScriptedVerbs:
    return ScriptedVerbs()


@pytest.fixture
def pings() -> Iterator[PingServer]:
    with serving_pings() as server:
        yield server


def job_of(verbs: ScriptedVerbs, **keys: Any) -> Job:
    profile = msgspec.structs.replace(PROFILE, **keys)
    job = Job("home", profile, "vm", Path("/etc/casfs/config.toml"))
    object.__setattr__(job, "scripted", verbs)
    return job


def run(verbs: ScriptedVerbs, **keys: Any) -> RunSummary:
    return run_profile(job_of(verbs, **keys), Silent(), lambda: verbs.now_s)


def state(verbs: ScriptedVerbs) -> ProfileState:
    return job_of(verbs).files().load()


def status(summary: RunSummary) -> dict[str, str]:
    return {step.step.value: step.status.value for step in summary.steps}


def test_all_steps_run_in_their_order_and_succeed(verbs: ScriptedVerbs) -> None:
    summary = run(verbs)
    assert verbs.ran == ALL
    assert (summary.exit, summary.outcome, summary.snapshot) == (0, Outcome.SUCCESS, "ab" * 32)
    assert [step.step.value for step in summary.steps] == ALL


def test_prune_and_check_wait_until_they_are_due_and_are_then_made_up(
    verbs: ScriptedVerbs,
) -> None:
    run(verbs)
    verbs.ran.clear()
    verbs.now_s += DAY / 2
    summary = run(verbs)
    assert verbs.ran == ["backup", "forget", "mirror"]
    assert status(summary)["check"] == "not due"
    verbs.ran.clear()
    verbs.now_s += 20 * DAY
    run(verbs)
    assert verbs.ran == ALL


def test_a_check_that_found_damage_is_repeated_at_the_next_run(verbs: ScriptedVerbs) -> None:
    verbs.codes["check"] = 5
    summary = run(verbs)
    assert (summary.exit, verbs.ran) == (5, ALL)
    assert state(verbs).damage == 2
    verbs.codes.clear()
    verbs.now_s += 60
    assert run(verbs).exit == 0
    assert verbs.ran[len(ALL) :] == ["backup", "forget", "check", "mirror"]
    assert state(verbs).damage == 0


def test_nothing_is_forgotten_after_a_backup_that_failed(verbs: ScriptedVerbs) -> None:
    verbs.codes["backup"] = 1
    summary = run(verbs)
    assert verbs.ran == ["backup", "prune", "check", "mirror"]
    assert (summary.exit, summary.snapshot) == (1, None)
    assert status(summary)["forget"] == "skipped"
    assert summary.steps[0].reason == "backup did not work"


@pytest.mark.parametrize(
    "problem",
    [
        {"kind": "missing source", "path": "/etc", "message": "this source does not exist"},
        {"kind": "unreadable", "path": "home", "message": "it cannot be read"},
    ],
)
def test_nothing_is_forgotten_while_a_source_is_missing(
    verbs: ScriptedVerbs, problem: JsonObject
) -> None:
    verbs.codes["backup"] = 3
    verbs.problems = [{"kind": "unreadable", "path": f"home/{n}"} for n in range(30)] + [problem]
    summary = run(verbs)
    assert "forget" not in verbs.ran
    assert summary.steps[1].reason == "nothing is forgotten when a source is missing"
    assert summary.outcome is Outcome.FAILED
    assert state(verbs).backup is not None


def test_an_unreadable_file_inside_a_source_keeps_no_step_from_running(
    verbs: ScriptedVerbs,
) -> None:
    verbs.codes["backup"] = 3
    verbs.problems = [{"kind": "unreadable", "path": "home/a", "message": "it cannot be read"}]
    summary = run(verbs)
    assert (verbs.ran, summary.exit) == (ALL, 3)
    assert summary.steps[0].problem_count == 1


def test_a_locked_repository_ends_the_steps(verbs: ScriptedVerbs) -> None:
    verbs.codes["backup"] = 6
    summary = run(verbs)
    assert (verbs.ran, summary.exit) == (["backup"], 6)
    assert {step.status for step in summary.steps[1:]} == {StepStatus.SKIPPED}


def test_a_failed_prune_keeps_neither_check_nor_mirror_from_running(verbs: ScriptedVerbs) -> None:
    verbs.codes["prune"] = 1
    summary = run(verbs)
    assert (verbs.ran, summary.exit) == (ALL, 1)


def test_an_interrupted_step_is_the_last_one(verbs: ScriptedVerbs, tmp_path: Path) -> None:
    verbs.interrupted = {"forget"}
    summary = run(verbs, hooks=Hooks(failure=Command(f"echo $CASFS_EXIT > {tmp_path}/seen")))
    assert (verbs.ran, summary.exit) == (["backup", "forget"], 130)
    assert (tmp_path / "seen").read_text() == "130\n"
    assert state(verbs).last_exit == 130


def test_an_interruption_between_steps_still_notifies(
    verbs: ScriptedVerbs, pings: PingServer
) -> None:
    def interrupt(verb: str) -> None:
        if verb == "prune":
            raise KeyboardInterrupt

    verbs.during = interrupt
    summary = run(verbs, ping=PingUrl(f"{pings.url}/id"))
    assert summary.exit == 130
    assert pings.paths == ["/id/start", "/id/fail"]


def test_an_error_in_casfs_itself_is_notified_before_it_is_raised(
    verbs: ScriptedVerbs, pings: PingServer, tmp_path: Path
) -> None:
    def break_down(verb: str) -> None:
        if verb == "prune":
            raise ZeroDivisionError("a bug")

    verbs.during = break_down
    with pytest.raises(ZeroDivisionError):
        run(
            verbs,
            ping=PingUrl(f"{pings.url}/id"),
            hooks=Hooks(finally_=Command(f"echo $CASFS_ERROR > {tmp_path}/error")),
        )
    assert pings.paths == ["/id/start", "/id/fail"]
    assert "a bug" in pings.requests[-1][2]
    assert "a bug" in (tmp_path / "error").read_text()
    assert state(verbs).last_exit == 1
    assert run(ScriptedVerbs()).exit == 0


def test_the_repository_is_measured_before_a_hook_may_take_it_away(
    verbs: ScriptedVerbs, tmp_path: Path
) -> None:
    order = tmp_path / "order"

    def note(verb: str) -> None:
        with order.open("a") as file:
            file.write(f"{verb}\n")

    verbs.during = note
    hooks = Hooks(after=Command(f"echo after >> {order}"))
    run(verbs, metrics_file=AbsolutePath(str(tmp_path / "casfs.prom")), hooks=hooks)
    assert order.read_text().split() == [*ALL, "stats", "after"]


def test_a_run_in_progress_keeps_a_second_one_out(verbs: ScriptedVerbs) -> None:
    refused = []

    def again(verb: str) -> None:
        with pytest.raises(LockedError) as caught:
            run(ScriptedVerbs())
        refused.append(caught.value.exit_code)

    verbs.during = again
    run(verbs)
    assert refused == [6] * len(ALL)


class TestHooks:
    def hooks(self, folder: Path, **commands: str) -> Hooks:
        """Return hooks that write down their names, then do more."""
        found = {}
        for name in ("before", "after", "failure", "finally_"):
            command = f"echo {name.strip('_')} >> {folder}/order; {commands.get(name, '')}"
            found[name] = Command(command)
        return Hooks(**found)

    def order(self, folder: Path) -> list[str]:
        return (folder / "order").read_text().split()

    def test_a_good_run_calls_before_after_and_finally(
        self, verbs: ScriptedVerbs, tmp_path: Path
    ) -> None:
        run(verbs, hooks=self.hooks(tmp_path))
        assert self.order(tmp_path) == ["before", "after", "finally"]

    def test_a_failed_run_calls_failure_in_place_of_after(
        self, verbs: ScriptedVerbs, tmp_path: Path
    ) -> None:
        verbs.codes["check"] = 5
        run(verbs, hooks=self.hooks(tmp_path))
        assert self.order(tmp_path) == ["before", "failure", "finally"]

    def test_a_failing_before_stops_the_run_and_still_notifies(
        self, verbs: ScriptedVerbs, tmp_path: Path, pings: PingServer
    ) -> None:
        summary = run(
            verbs,
            hooks=self.hooks(tmp_path, before="exit 3"),
            ping=PingUrl(f"{pings.url}/id"),
            notify=Notification(command=Command(f"cat > {tmp_path}/mail")),
        )
        assert verbs.ran == []
        assert (summary.exit, summary.error) == (1, "the before hook failed with exit 3")
        assert {step.reason for step in summary.steps} == {"the before hook failed"}
        assert self.order(tmp_path) == ["before", "failure", "finally"]
        assert pings.paths == ["/id/start", "/id/fail"]
        assert "the before hook failed with exit 3" in pings.requests[1][2]
        assert (tmp_path / "mail").read_text() == pings.requests[1][2]

    @pytest.mark.parametrize("name", ["after", "finally_"])
    def test_a_hook_that_fails_makes_the_run_fail(
        self, verbs: ScriptedVerbs, tmp_path: Path, name: str, pings: PingServer
    ) -> None:
        url = PingUrl(f"{pings.url}/id")
        summary = run(verbs, hooks=self.hooks(tmp_path, **{name: "exit 9"}), ping=url)
        assert (summary.exit, verbs.ran) == (1, ALL)
        assert pings.paths[-1] == "/id/fail"

    def test_a_failing_hook_hides_no_damage(self, verbs: ScriptedVerbs, tmp_path: Path) -> None:
        verbs.codes["check"] = 5
        assert run(verbs, hooks=self.hooks(tmp_path, failure="exit 9")).exit == 5

    def test_the_summary_is_on_standard_input_and_in_variables(
        self, verbs: ScriptedVerbs, tmp_path: Path
    ) -> None:
        verbs.codes["backup"] = 4
        command = f"cat > {tmp_path}/stdin; env > {tmp_path}/env"
        run(verbs, hooks=Hooks(after=Command(command)))
        summary = json.loads((tmp_path / "stdin").read_text())
        assert (summary["type"], summary["profile"], summary["exit"]) == ("run", "home", 4)
        assert summary["outcome"] == "warning"
        assert summary["steps"][0]["result"] == SNAPSHOT
        assert [step["step"] for step in summary["steps"]] == ALL
        lines = (tmp_path / "env").read_text().splitlines()
        for line in (
            "CASFS_HOOK=after",
            "CASFS_PROFILE=home",
            "CASFS_REPOSITORY=nas",
            "CASFS_HOST=vm",
            "CASFS_EXIT=4",
            "CASFS_OUTCOME=warning",
            f"CASFS_SNAPSHOT={'ab' * 32}",
            "CASFS_FILES=3",
            "CASFS_BYTES=1000",
            "CASFS_ADDED_BYTES=10",
            "CASFS_FLAGGED=0",
            "CASFS_UNREADABLE=0",
            "CASFS_ERROR=",
            "CASFS_FAILED_STEPS=backup",
        ):
            assert line in lines


class TestReports:
    def test_pings_report_start_and_success_with_the_summary(
        self, verbs: ScriptedVerbs, pings: PingServer
    ) -> None:
        run(verbs, ping=PingUrl(f"{pings.url}/id"))
        assert pings.paths == ["/id/start", "/id"]
        assert "backup: done" in pings.requests[1][2]

    def test_a_warning_is_a_success_for_the_ping_and_a_problem_for_the_command(
        self, verbs: ScriptedVerbs, pings: PingServer, tmp_path: Path
    ) -> None:
        verbs.codes["backup"] = 4
        run(
            verbs,
            ping=PingUrl(f"{pings.url}/id"),
            notify=Notification(command=Command(f"cat > {tmp_path}/mail")),
        )
        assert pings.paths == ["/id/start", "/id"]
        assert "succeeded with warnings" in (tmp_path / "mail").read_text()

    def test_pings_that_fail_change_no_outcome(
        self, verbs: ScriptedVerbs, pings: PingServer
    ) -> None:
        pings.answers += [404, 404]
        assert run(verbs, ping=PingUrl(f"{pings.url}/id")).exit == 0
        assert verbs.ran == ALL

    def test_metrics_keep_the_last_success_when_a_run_fails(
        self, verbs: ScriptedVerbs, tmp_path: Path
    ) -> None:
        path = tmp_path / "casfs.prom"
        run(verbs, metrics_file=AbsolutePath(str(path)))
        assert verbs.ran == [*ALL, "stats"]
        good = set(path.read_text().splitlines())
        labels = '{profile="home",repository="nas"}'
        verbs.now_s += DAY
        verbs.codes = {"backup": 1, "check": 1, "prune": 1, "mirror": 1}
        run(verbs, metrics_file=AbsolutePath(str(path)))
        bad = path.read_text().splitlines()
        for kept in (
            f"casfs_run_last_success_timestamp_seconds{labels} 1800000000.0",
            f"casfs_backup_files{labels} 3",
            f"casfs_backup_bytes{labels} 1000",
            f"casfs_check_damage{labels} 0",
            f"casfs_repository_bytes{labels} 500",
            f"casfs_repository_oldest_verification_timestamp_seconds{labels} 1767225600.0",
        ):
            assert kept in good and kept in bad, kept
        assert f"casfs_run_exit_code{labels} 1" in bad
        assert f"casfs_run_consecutive_failures{labels} 1" in bad
        assert f"casfs_run_last_start_timestamp_seconds{labels} 1800086400.0" in bad

    def test_a_metrics_file_that_cannot_be_written_changes_no_outcome(
        self, verbs: ScriptedVerbs, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = AbsolutePath(str(tmp_path / "missing" / "casfs.prom"))
        assert run(verbs, metrics_file=path).exit == 0
        assert "cannot write the metrics file" in caplog.text

    def test_a_state_folder_that_cannot_be_written_keeps_the_run_from_starting(
        self, verbs: ScriptedVerbs, tmp_path: Path
    ) -> None:
        (tmp_path / "state").touch()
        with pytest.raises(StorageError, match="lock of the profile"):
            run(verbs)
        assert verbs.ran == []
