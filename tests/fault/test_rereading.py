"""Reading unchanged files too: content that moved while size, mtime and ctime did not."""

from __future__ import annotations

from pathlib import Path

import pytest
from blake3 import blake3

from casfs.cli.backup_report import exit_code
from casfs.format.tree import CaptureState, captured_digest
from casfs.monitor import ProblemKind
from tests.support.capturing import BackupFixture, PublishedBackup
from tests.support.scripted_source import ScriptedSource, content

pytestmark = [pytest.mark.fuse, pytest.mark.usefixtures("no_pauses")]


def openings(scripted: ScriptedSource, file: Path) -> int:
    return max((opening for opening, _ in scripted.served(file)), default=0)


@pytest.fixture
def scene(scripted: ScriptedSource) -> Path:
    return scripted.scene(
        {
            "empty": {"seed": "", "size": 0},
            "rotten": {"seed": "old", "size": 2_000_000},
            "sound": {"seed": "sound", "size": 2_000_000},
        }
    )


def test_unchanged_files_are_reread_only_on_request(
    scripted: ScriptedSource, backups: BackupFixture, scene: Path
) -> None:
    backups.back_up(scene)
    second = backups.back_up(scene)
    assert openings(scripted, scene / "sound") == 1
    third = backups.back_up(scene, reread=True)
    assert openings(scripted, scene / "sound") == 2
    for backup in (second, third):
        assert backup.result.snapshot.stats.unchanged == 3
        assert (backup.exit, backup.problems) == (0, [])
    # Not the whole trees: other processes change the directories that lead to the scene.
    for name in ("empty", "rotten", "sound"):
        assert third.file(scene / name) == second.file(scene / name)


def test_silent_corruption_is_reported_and_stored_and_the_old_snapshot_keeps_the_old_content(
    scripted: ScriptedSource, backups: BackupFixture, tmp_path: Path, scene: Path
) -> None:
    first = backups.back_up(scene)
    scripted.rot(scene / "rotten", "rot")
    blind = backups.back_up(scene)
    assert (blind.exit, blind.result.snapshot.stats.unchanged) == (0, 3)
    reread = backups.back_up(scene, reread=True)
    old, new = content("old", 2_000_000), content("rot", 2_000_000)

    stats = reread.result.snapshot.stats
    assert (stats.unchanged, stats.silently_changed) == (2, 1)
    assert reread.exit == 4
    assert exit_code(reread.result, changed_ok=True) == 0
    assert reread.flagged == 0, "what was captured is no mixture"
    (problem,) = reread.problems
    assert problem.kind == ProblemKind.SILENTLY_CHANGED
    assert problem.path.endswith(b"/rotten")
    assert problem.details == {
        "captured": blake3(new).hexdigest(),
        "previous": blake3(old).hexdigest(),
    }
    node = reread.file(scene / "rotten")
    assert (node.state, node.racy) == (CaptureState.STABLE, False)
    for backup, expected in ((first, old), (blind, old), (reread, new)):
        target = backup.restore(tmp_path / str(id(backup))) / scene.relative_to("/")
        assert (target / "rotten").read_bytes() == expected
    again = backups.back_up(scene, reread=True)
    assert (again.exit, again.problems) == (0, []), "it is reported once"
    backups.assert_is_intact()


@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_a_change_with_new_timestamps_is_not_reported_as_silent(
    scripted: ScriptedSource, backups: BackupFixture, where: str
) -> None:
    rule = {"opening": 2, "reading": 1, "where": where, "change": "rewrite", "seed": "new"}
    spec = {"seed": "old", "size": 100_000, "rules": [rule]}
    file = scripted.scene({"file": spec}) / "file"
    backups.back_up(file.parent)
    backup = backups.back_up(file.parent, reread=True)
    assert backup.result.snapshot.stats.silently_changed == 0
    assert (backup.exit, backup.problems) == (0, [])
    assert captured_digest(backup.file(file)) == blake3(content("new", 100_000)).digest()


def test_a_file_that_changes_during_a_reread_is_flagged_and_not_called_silent(
    scripted: ScriptedSource, backups: BackupFixture
) -> None:
    rules = [
        {"opening": opening, "reading": 1, "where": "between", "change": "rewrite", "seed": "new"}
        for opening in (2, 3, 4, 5)
    ]
    for number, rule in enumerate(rules):
        rule["seed"] = f"version {number}"
    spec = {"seed": "old", "size": 100_000, "rules": rules}
    file = scripted.scene({"file": spec}) / "file"
    backups.back_up(file.parent)
    backup = backups.back_up(file.parent, reread=True)
    assert backup.result.snapshot.stats.silently_changed == 0
    assert (backup.flagged, backup.exit) == (1, 4)


def test_silent_corruption_in_an_unreadable_file_is_reported_as_unreadable(
    scripted: ScriptedSource, backups: BackupFixture
) -> None:
    rule = {"opening": 2, "reading": 1, "where": "between", "change": "read error"}
    file = scripted.scene({"file": {"seed": "old", "size": 100_000, "rules": [rule]}}) / "file"
    first = backups.back_up(file.parent)
    second = backups.back_up(file.parent, reread=True)
    assert (first.exit, second.exit) == (0, 3)
    assert kinds(second) == [ProblemKind.UNREADABLE]
    assert backups.back_up(file.parent).exit == 0


def kinds(backup: PublishedBackup) -> list[ProblemKind]:
    return [problem.kind for problem in backup.problems]
