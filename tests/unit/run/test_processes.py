"""Verbs and hooks as processes: what is kept of what they print, and how they are interrupted."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.run.outcome import JsonObject
from casfs.run.processes import VerbEnd, VerbRunner, run_hook


def runner(script: str, *more: str, lock_fd: int | None = None, **variables: str) -> VerbRunner:
    """Return a command that runs a Python script in place of casfs."""
    return VerbRunner(more, dict(os.environ) | variables, lock_fd, [sys.executable, "-c", script])


def run(script: str, *verb: str) -> VerbEnd:
    return runner(script).run(verb or ("backup",))


def test_a_verb_is_given_the_common_arguments_and_json() -> None:
    end = runner(
        "import json, sys; print(json.dumps({'type': 'x', 'argv': sys.argv[1:]}))", "-r", "nas"
    ).run(["backup", "--", "/home"])
    assert end.exit == 0
    assert end.output.result == {
        "type": "x",
        "argv": ["backup", "-r", "nas", "--json", "--", "/home"],
    }


def test_the_last_object_is_the_result_and_problems_are_counted() -> None:
    lines: list[JsonObject] = [{"type": "problem", "path": f"/{n}"} for n in range(25)]
    lines += [{"type": "snapshot", "id": "first"}, {"type": "damage", "path": "/d"}]
    lines += [{"type": "snapshot", "id": "last"}, {"type": "progress"}, {"type": "requests"}]
    seen: list[JsonObject] = []
    text = "\n".join(map(json.dumps, lines)) + "\nnot JSON\n[1]\n"
    end = runner(f"print({text!r})").run(["backup"], seen.append)
    assert end.output.result == {"type": "snapshot", "id": "last"}
    assert (end.output.problem_count, len(end.output.problems), len(seen)) == (26, 20, 26)
    assert seen[-1]["type"] == "damage"


def test_what_a_failed_verb_says_is_kept_with_its_exit_code() -> None:
    end = run('print(\'{"type": "error", "message": "no disk"}\'); raise SystemExit(5)')
    assert (end.exit, end.output.error, end.output.result) == (5, "no disk", None)


def test_a_verb_that_is_killed_counts_as_failed() -> None:
    end = run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert (end.exit, end.output.error) == (1, "was ended by SIGKILL")


def test_a_verb_that_cannot_be_started_counts_as_failed(tmp_path: Path) -> None:
    end = VerbRunner([], {}, None, [str(tmp_path / "missing")]).run(["backup"])
    assert end.exit == 1
    assert end.output.error is not None and "cannot be started" in end.output.error


def test_an_endless_line_is_not_kept_in_memory() -> None:
    end = run("print('{' + 'x' * 5_000_000); print('{\"type\": \"y\"}')")
    assert end.output.result == {"type": "y"}


def test_casfs_is_not_imported_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "casfs").mkdir()
    (tmp_path / "casfs" / "__main__.py").write_text("raise SystemExit(99)")
    monkeypatch.chdir(tmp_path)
    end = VerbRunner([], dict(os.environ)).run(["version"])
    assert end.exit == 0
    assert end.output.result is not None and end.output.result["type"] == "version"


@pytest.fixture
def interrupted_when(tmp_path: Path) -> Iterator[Path]:
    """A file whose appearance sends SIGINT to this process, once for each time it appears."""
    path = tmp_path / "interrupt"
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            if path.exists():
                path.unlink()
                os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch)
    thread.start()
    yield path
    ended.set()
    thread.join()


def test_an_interruption_is_passed_on_and_the_verb_ends_in_its_own_time(
    interrupted_when: Path,
) -> None:
    script = f"""
import pathlib, signal, sys, time
def end(*_):
    print("x" * 1_000_000)
    print('{{"type": "snapshot", "id": "late"}}')
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
pathlib.Path({str(interrupted_when)!r}).touch()
while True:
    time.sleep(1)
"""
    end = run(script)
    assert (end.exit, end.was_interrupted) == (130, True)
    assert end.output.result == {"type": "snapshot", "id": "late"}


def test_a_second_interruption_kills_a_verb_that_does_not_end(interrupted_when: Path) -> None:
    script = f"""
import pathlib, signal, time
flag = pathlib.Path({str(interrupted_when)!r})
signal.signal(signal.SIGTERM, lambda *_: flag.touch())
flag.touch()
while True:
    time.sleep(1)
"""
    start = time.monotonic()
    end = run(script)
    assert (end.exit, end.was_interrupted) == (130, True)
    assert time.monotonic() - start < 60


def test_a_hook_gets_the_summary_and_prints_to_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = run_hook(
        "after", f"cat > {tmp_path}/seen; echo $WORD", b"summary", {**os.environ, "WORD": "hello"}
    )
    assert (outcome.hook, outcome.exit) == ("after", 0)
    assert (tmp_path / "seen").read_text() == "summary"
    out, err = capfd.readouterr()
    assert (out, err) == ("", "hello\n")


def test_a_hook_that_does_not_read_the_summary_is_no_failure() -> None:
    assert run_hook("after", "exec <&-; exit 0", b"x" * 1_000_000, dict(os.environ)).exit == 0


@pytest.mark.parametrize(
    ("command", "code"), [("exit 7", 7), ("kill -9 $$", 137), ("no-such", 127)]
)
def test_a_hook_that_fails_says_how(command: str, code: int) -> None:
    assert run_hook("before", command, b"", dict(os.environ)).exit == code


def test_an_interrupted_hook_is_ended_with_all_that_it_started(
    interrupted_when: Path, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    command = f"sleep 1000 & echo $! > {pid}; touch {interrupted_when}; wait"
    with pytest.raises(KeyboardInterrupt):
        run_hook("before", command, b"", dict(os.environ))
    with pytest.raises(ProcessLookupError):
        while True:
            os.kill(int(pid.read_text()), 0)
            time.sleep(0.01)
