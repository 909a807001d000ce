"""Files that change while the installed command reads them: what it says, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Casfs, Result
from tests.support.scripted_source import ScriptedSource, content, scripted_source

pytestmark = pytest.mark.fuse

SIZE = 100_000


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedSource]:
    with scripted_source(tmp_path_factory.mktemp("scripted") / "mnt") as source:
        yield source


def changing(change: str, opening: int = 0, where: str = "between") -> dict[str, Any]:
    rule = {"opening": opening, "reading": 1, "where": where, "change": change, "size": SIZE}
    return {"seed": "old", "size": SIZE, "rules": [{**rule, "seed": "version "}]}


def backup(casfs: Casfs, scene: Path, *options: str, expect: int) -> tuple[Result, dict[str, Any]]:
    """Back up with --json; return the run and the `problem` lines by the file's name."""
    result = casfs.json("backup", *options, scene, expect=expect)
    problems = {line["path"].rpartition("/")[2]: line for line in result.of_type("problem")}
    assert len(problems) == len(result.of_type("problem"))
    return result, problems


def test_a_file_that_keeps_changing_is_flagged_reported_and_restored_as_captured(
    repository: Casfs, scripted: ScriptedSource, tmp_path: Path
) -> None:
    scene = scripted.scene({"restless": changing("rewrite"), "still": {"seed": "s", "size": 9}})
    result, problems = backup(repository, scene, expect=4)
    served = scripted.served(scene / "restless")
    problem = problems.pop("restless")
    assert problems == {}
    assert (problem["kind"], problem["state"], problem["reason"], problem["attempts"]) == (
        *("changed", "changed", "rewritten"),
        4,
    )
    assert problem["captured"] == served[4, 1][0]
    assert problem["observed"] == served[4, 2][0]
    snapshot = result.one("snapshot")
    assert (snapshot["files"], snapshot["flagged"], snapshot["unreadable"]) == (2, 1, 0)
    assert "restless" in result.complaint

    (flagged,) = repository.json("changed", "latest").of_type("changed")
    assert flagged["path"].endswith("/restless")
    restored = repository.json("restore", "latest", "--target", tmp_path / "target")
    assert [line["kind"] for line in restored.of_type("problem")] == ["changed"]
    file = tmp_path / "target" / (scene / "restless").relative_to("/")
    assert len(file.read_bytes()) == SIZE
    repository.run("check", "--read-data")


def test_a_backup_prints_which_file_changed_why_and_how_many(
    repository: Casfs, scripted: ScriptedSource
) -> None:
    scene = scripted.scene({"restless": changing("rewrite")})
    result = repository.run("backup", scene, expect=4)
    (sentence,) = [line for line in result.complaints if "restless" in line]
    assert "changed while it was read" in sentence
    assert "rewritten" in sentence
    assert "1 file changed during" in result.text


def test_changed_ok_accepts_only_changed_files(repository: Casfs, scripted: ScriptedSource) -> None:
    restless = {"restless": changing("rewrite")}
    _, problems = backup(repository, scripted.scene(restless), "--changed-ok", expect=0)
    assert problems.keys() == {"restless"}
    broken = {**restless, "broken": changing("read error")}
    scene = scripted.scene(broken)
    result, problems = backup(repository, scene, "--changed-ok", expect=3)
    assert {name: problem["kind"] for name, problem in problems.items()} == {
        "broken": "unreadable",
        "restless": "changed",
    }
    backup(repository, scripted.scene(broken), expect=3)
    assert result.one("snapshot")["unreadable"] == 1


def test_a_file_whose_writer_finishes_before_the_end_of_the_backup_is_not_flagged(
    repository: Casfs, scripted: ScriptedSource, tmp_path: Path
) -> None:
    rules = [changing("rewrite", opening)["rules"][0] for opening in (1, 2, 3)]
    for number, rule in enumerate(rules, 1):
        rule["seed"] = f"version {number}"
    scene = scripted.scene({"file": {"seed": "old", "size": SIZE, "rules": rules}})
    result, problems = backup(repository, scene, expect=0)
    assert problems == {}
    assert result.one("snapshot")["flagged"] == 0
    repository.run("restore", "latest", "--target", tmp_path / "target")
    file = tmp_path / "target" / (scene / "file").relative_to("/")
    assert file.read_bytes() == content("version 3", SIZE)


@pytest.mark.parametrize(
    ("options", "attempts"),
    [(["--attempts", "1"], 1), (["--attempts", "2"], 3), (["--patience", "0"], 1)],
)
def test_attempts_and_time_are_bounded_by_options(
    repository: Casfs, scripted: ScriptedSource, options: list[str], attempts: int
) -> None:
    scene = scripted.scene({"restless": changing("rewrite")})
    _, problems = backup(repository, scene, *options, expect=4)
    assert problems["restless"]["attempts"] == attempts
    assert max(opening for opening, _ in scripted.served(scene / "restless")) == attempts


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        ("append", "appended", "grew"),
        ("unlink", "vanished", "vanished"),
        ("rename over", None, None),
        ("chmod", None, None),
        ("fifo", None, None),
    ],
)
def test_a_consistent_capture_does_not_change_the_exit_code(
    repository: Casfs, scripted: ScriptedSource, change: str, kind: str | None, reason: str | None
) -> None:
    scene = scripted.scene({"file": changing(change, opening=1)})
    result, problems = backup(repository, scene, expect=0)
    if kind is None:
        assert problems == {}
    else:
        assert (problems["file"]["kind"], problems["file"]["reason"]) == (kind, reason)
    assert result.one("snapshot")["vanished"] == (kind == "vanished")


@pytest.mark.parametrize(
    "options",
    [
        ["--freeze", "sometimes"],
        ["--attempts", "0"],
        ["--patience", "-1"],
        ["--patience", "soon"],
    ],
)
def test_meaningless_capture_options_are_refused(
    repository: Casfs, source: Path, options: list[str]
) -> None:
    repository.refuses("backup", *options, source, expect=2, mentions=[options[0]])
