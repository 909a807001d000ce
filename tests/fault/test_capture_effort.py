"""How hard a capture tries: attempts, patience, the last look, clocks too coarse to show a change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from casfs.digest import Digest
from casfs.format.tree import CaptureState, ChangeReason, capture_of, captured_digest
from casfs.monitor import ProblemKind
from tests.support.capturing import BackupFixture
from tests.support.scripted_source import ScriptedSource, content

pytestmark = [pytest.mark.fuse, pytest.mark.usefixtures("no_pauses")]

SMALL = 100_000
LARGE = 2_000_000


def rewritten(*openings: int, where: str = "between", reading: int = 1) -> list[dict[str, Any]]:
    """Return a script that rewrites the file at these openings (0: at each)."""
    return [
        {
            "opening": opening,
            "reading": reading,
            "where": where,
            "change": "rewrite",
            "seed": f"version {opening} ",
        }
        for opening in openings
    ]


def changing(size: int = SMALL, *openings: int) -> dict[str, Any]:
    return {"seed": "old", "size": size, "rules": rewritten(*(openings or (0,)))}


def openings(scripted: ScriptedSource, file: Path) -> int:
    return max((opening for opening, _ in scripted.served(file)), default=0)


def reads(scripted: ScriptedSource, file: Path) -> int:
    return len(scripted.served(file))


class TestCaptureAttempts:
    @pytest.mark.parametrize(("attempts", "made"), [(1, 1), (2, 3), (3, 4), (5, 6)])
    def test_a_changing_file_is_captured_as_often_as_allowed_and_once_more_at_the_end(
        self, scripted: ScriptedSource, backups: BackupFixture, attempts: int, made: int
    ) -> None:
        file = scripted.scene({"file": changing()}) / "file"
        backup = backups.back_up(file.parent, attempts=attempts)
        assert openings(scripted, file) == made
        capture = capture_of(backup.file(file))
        assert capture is not None and capture.attempts == made
        assert (backup.flagged, backup.exit) == (1, 4)
        problem = backup.problem(file)
        assert problem is not None and problem.details["attempts"] == made

    def test_a_stable_capture_ends_the_attempts(
        self, scripted: ScriptedSource, backups: BackupFixture
    ) -> None:
        file = scripted.scene({"file": changing(SMALL, 1)}) / "file"
        backup = backups.back_up(file.parent, attempts=10)
        assert openings(scripted, file) == 2
        assert (backup.flagged, backup.exit, backup.problems) == (0, 0, [])

    def test_a_discarded_attempt_stores_nothing_of_a_small_file(
        self, scripted: ScriptedSource, backups: BackupFixture
    ) -> None:
        file = scripted.scene({"file": changing(SMALL, 1, 2)}) / "file"
        backup = backups.back_up(file.parent)
        served = scripted.served(file)
        stored = [
            backups.repository.store.index.lookup(Digest(bytes.fromhex(served[opening, 1][0])))
            for opening in (1, 2, 3)
        ]
        assert [place is not None for place in stored] == [False, False, True]
        assert captured_digest(backup.file(file)) == bytes.fromhex(served[3, 1][0])

    def test_a_consistent_prefix_ends_the_attempts(
        self, scripted: ScriptedSource, backups: BackupFixture
    ) -> None:
        rule = {"opening": 0, "reading": 1, "where": "after", "change": "append", "size": 10}
        file = scripted.scene({"file": {"seed": "old", "size": SMALL, "rules": [rule]}}) / "file"
        backup = backups.back_up(file.parent)
        assert openings(scripted, file) == 1
        assert backup.file(file).state == CaptureState.APPENDED
        assert (backup.flagged, backup.exit) == (0, 0)

    def test_a_consistent_prefix_replaces_an_earlier_mixture(
        self, scripted: ScriptedSource, backups: BackupFixture
    ) -> None:
        append = {"opening": 2, "reading": 1, "where": "after", "change": "append", "size": 10}
        spec = {"seed": "old", "size": SMALL, "rules": [*rewritten(1), append]}
        file = scripted.scene({"file": spec}) / "file"
        backup = backups.back_up(file.parent)
        assert openings(scripted, file) == 2
        node = backup.file(file)
        capture = capture_of(node)
        assert capture is not None
        assert (node.state, capture.reason, capture.attempts) == (
            CaptureState.APPENDED,
            ChangeReason.GREW,
            2,
        )
        assert captured_digest(node) == blake3(content("version 1 ", SMALL)).digest()

    def test_a_whole_replaced_file_is_kept_when_its_successor_keeps_changing(
        self, scripted: ScriptedSource, backups: BackupFixture
    ) -> None:
        replaced = {
            "opening": 1,
            "reading": 1,
            "where": "after",
            "change": "rename over",
            "seed": "successor",
            "size": SMALL,
        }
        spec = {"seed": "old", "size": SMALL, "rules": [replaced, *rewritten(2, 3)]}
        file = scripted.scene({"file": spec}) / "file"
        backup = backups.back_up(file.parent)
        node = backup.file(file)
        capture = capture_of(node)
        assert capture is not None
        found = (node.state, capture.reason, capture.attempts)
        assert found == (CaptureState.STABLE, ChangeReason.REPLACED, 3)
        assert captured_digest(node) == blake3(content("old", SMALL)).digest()

    def test_an_earlier_attempt_is_kept_when_the_file_can_no_longer_be_opened(
        self, scripted: ScriptedSource, backups: BackupFixture
    ) -> None:
        script = [*rewritten(1), {**rewritten(1, where="after")[0], "change": "chmod"}]
        file = scripted.scene({"file": {"seed": "old", "size": SMALL, "rules": script}}) / "file"
        backup = backups.back_up(file.parent)
        node = backup.file(file)
        assert node.state == CaptureState.CHANGED
        assert backup.exit == 4
        digest = captured_digest(node)
        assert digest is not None
        assert scripted.served(file)[1, 1][0] == digest.hex()


class TestFinalRetry:
    def test_the_final_retry_unflags_a_file_that_became_stable(
        self, scripted: ScriptedSource, backups: BackupFixture, tmp_path: Path
    ) -> None:
        spec = {
            "a": {"seed": "a", "size": 10},
            "file": changing(LARGE, 1, 2, 3),
            "never": changing(SMALL, 0),
            "z": {"seed": "z", "size": 10},
        }
        scene = scripted.scene(spec)
        backup = backups.back_up(scene)
        node = backup.file(scene / "file")
        capture = capture_of(node)
        assert capture is not None
        found = (node.state, capture.reason, capture.attempts, capture.observed)
        assert found == (CaptureState.STABLE, ChangeReason.REWRITTEN, 4, None)
        assert backup.flagged == 1
        assert [problem.path.rpartition(b"/")[2] for problem in backup.problems] == [b"never"]
        stats = backup.result.snapshot.stats
        assert (stats.files, stats.unreadable, stats.vanished) == (4, 0, 0)
        restored = backup.restore(tmp_path / "target") / scene.relative_to("/")
        assert (restored / "file").read_bytes() == content("version 3 ", LARGE)
        assert (restored / "a").read_bytes() == content("a", 10)
        assert (restored / "z").read_bytes() == content("z", 10)
        backups.assert_is_intact()

    def test_the_final_retry_keeps_the_capture_of_a_file_that_is_gone(
        self, scripted: ScriptedSource, backups: BackupFixture
    ) -> None:
        gone = {"opening": 3, "reading": 2, "where": "after", "change": "unlink"}
        spec = {"seed": "old", "size": SMALL, "rules": [*rewritten(1, 2, 3), gone]}
        file = scripted.scene({"file": spec}) / "file"
        backup = backups.back_up(file.parent)
        node = backup.file(file)
        capture = capture_of(node)
        assert capture is not None
        assert (node.state, capture.attempts) == (CaptureState.CHANGED, 3)
        problem = backup.problem(file)
        assert problem is not None and problem.kind == ProblemKind.CHANGED

    def test_a_dry_run_makes_no_final_retry_and_reports_what_it_found(
        self, scripted: ScriptedSource, backups: BackupFixture
    ) -> None:
        file = scripted.scene({"file": changing(SMALL, 0)}) / "file"
        backup = backups.back_up(file.parent, dry_run=True)
        assert openings(scripted, file) == 3
        problem = backup.problem(file)
        assert problem is not None and problem.details["attempts"] == 3
        assert backups.repository.store.index.blob_count() == 0

    def test_the_final_retry_finds_a_file_that_is_itself_a_source(
        self, scripted: ScriptedSource, backups: BackupFixture
    ) -> None:
        file = scripted.scene({"file": changing(SMALL, 1, 2, 3), "other": changing()}) / "file"
        backup = backups.back_up(file)
        assert backup.file(file).state == CaptureState.STABLE
        assert openings(scripted, file) == 4
        assert backup.node(file.parent / "other") is None


class TestRetryBudget:
    def test_an_empty_retry_budget_allows_one_attempt(
        self, scripted: ScriptedSource, backups: BackupFixture
    ) -> None:
        file = scripted.scene({"file": changing()}) / "file"
        backup = backups.back_up(file.parent, patience_s=0.0)
        assert openings(scripted, file) == 1
        assert backup.exit == 4
        assert backup.problem(file) is not None

    def test_a_spent_retry_budget_leaves_one_attempt_for_each_other_file(
        self, scripted: ScriptedSource, backups: BackupFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("casfs.backup.capture.FIRST_PAUSE_S", 0.01)
        scene = scripted.scene({f"file {number:02d}": changing() for number in range(20)})
        backup = backups.back_up(scene, attempts=100, patience_s=0.1)
        made = [openings(scripted, scene / f"file {number:02d}") for number in range(20)]
        assert made[0] > 1
        assert made[-1] <= 2, "one attempt in the walk, and perhaps one at the end"
        assert sum(made) < 60
        assert backup.flagged == 20

    def test_a_stable_file_spends_no_retry_budget(
        self, scripted: ScriptedSource, backups: BackupFixture
    ) -> None:
        scene = scripted.scene({"still": {"seed": "s", "size": LARGE}, "then": changing(SMALL, 1)})
        backup = backups.back_up(scene, patience_s=1.0)
        assert backup.flagged == 0


class TestCoarseClock:
    """The file's times are those of its opening, and nothing that happens moves them."""

    def test_the_witness_read_sees_a_rewrite_that_moves_no_timestamp(
        self, scripted: ScriptedSource, backups: BackupFixture
    ) -> None:
        spec = {"seed": "old", "size": SMALL, "young": True, "rules": rewritten(1)}
        file = scripted.scene({"file": spec}) / "file"
        backup = backups.back_up(file.parent)
        node = backup.file(file)
        capture = capture_of(node)
        assert capture is not None
        found = (node.state, capture.reason, capture.attempts, node.racy)
        assert found == (CaptureState.STABLE, ChangeReason.REWRITTEN, 2, True)
        assert captured_digest(node) == blake3(content("version 1 ", SMALL)).digest()

    def test_a_rewrite_at_every_read_is_flagged(
        self, scripted: ScriptedSource, backups: BackupFixture
    ) -> None:
        spec = {"seed": "old", "size": SMALL, "young": True, "rules": rewritten(0)}
        file = scripted.scene({"file": spec}) / "file"
        backup = backups.back_up(file.parent)
        assert backup.file(file).state == CaptureState.CHANGED
        assert backup.exit == 4

    def test_a_young_file_is_stable_and_read_again_by_the_next_backup(
        self, scripted: ScriptedSource, backups: BackupFixture
    ) -> None:
        spec = {"seed": "old", "size": SMALL, "young": True}
        file = scripted.scene({"file": spec}) / "file"
        first = backups.back_up(file.parent)
        node = first.file(file)
        assert (node.state, node.racy, capture_of(node)) == (CaptureState.STABLE, True, None)
        assert reads(scripted, file) == 2, "a capture and its witness"
        second = backups.back_up(file.parent)
        assert second.result.snapshot.stats.unchanged == 0
        assert openings(scripted, file) == 2


class TestNextBackup:
    @pytest.mark.parametrize("change", ["append", "rewrite", "rename over", None], ids=str)
    def test_the_next_backup_trusts_only_files_that_were_plainly_stable(
        self, scripted: ScriptedSource, backups: BackupFixture, change: str | None
    ) -> None:
        rule = {"opening": 1, "reading": 1, "where": "after", "change": change, "size": SMALL}
        spec = {"seed": "old", "size": SMALL, "rules": [rule] if change else []}
        file = scripted.scene({"file": spec}) / "file"
        first = backups.back_up(file.parent, attempts=1)
        expected = {"append": CaptureState.APPENDED, "rewrite": CaptureState.CHANGED}
        assert first.file(file).state == expected.get(str(change), CaptureState.STABLE)
        before = openings(scripted, file)
        second = backups.back_up(file.parent)
        assert openings(scripted, file) == before + (change is not None)
        assert second.result.snapshot.stats.unchanged == (change is None)
        node = second.file(file)
        assert node.state == CaptureState.STABLE
        third = backups.back_up(file.parent)
        assert third.result.snapshot.stats.unchanged == 1


class TestWrongStatSize:
    def test_a_file_is_read_no_further_than_its_reported_size(
        self, scripted: ScriptedSource, backups: BackupFixture
    ) -> None:
        spec = {"seed": "endless", "size": LARGE, "stat_size": SMALL}
        file = scripted.scene({"file": spec}) / "file"
        node = backups.back_up(file.parent).file(file)
        assert (node.state, node.size) == (CaptureState.STABLE, SMALL)
        assert captured_digest(node) == blake3(content("endless", LARGE)[:SMALL]).digest()

    def test_a_file_that_ends_before_its_reported_size_has_the_size_that_was_read(
        self, scripted: ScriptedSource, backups: BackupFixture
    ) -> None:
        spec = {"seed": "short", "size": SMALL, "stat_size": LARGE}
        file = scripted.scene({"file": spec}) / "file"
        node = backups.back_up(file.parent).file(file)
        assert (node.state, node.size) == (CaptureState.STABLE, SMALL)
        assert reads(scripted, file) == 2, "only a witness could say that this is all"


class TestExitCode:
    def test_an_unreadable_file_outranks_a_changed_file_in_the_exit_code(
        self, scripted: ScriptedSource, backups: BackupFixture
    ) -> None:
        broken = {"opening": 0, "reading": 1, "where": "between", "change": "read error"}
        scene = scripted.scene(
            {
                "a": {"seed": "a", "size": 10},
                "broken": {"seed": "b", "size": LARGE, "rules": [broken]},
                "changes": changing(),
                "z": {"seed": "z", "size": LARGE},
            }
        )
        backup = backups.back_up(scene)
        assert (backup.exit, backup.flagged) == (3, 1)
        stats = backup.result.snapshot.stats
        assert (stats.files, stats.unreadable) == (3, 1)
        assert {problem.kind for problem in backup.problems} == {
            ProblemKind.UNREADABLE,
            ProblemKind.CHANGED,
        }
        assert captured_digest(backup.file(scene / "z")) == blake3(content("z", LARGE)).digest()
        backups.assert_is_intact()


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("order", ["changing first", "true one first"])
@pytest.mark.parametrize("where", ["between", "after"])
def test_a_changed_file_never_supplies_the_data_of_a_file_with_its_old_content(
    scripted: ScriptedSource,
    backups: BackupFixture,
    tmp_path: Path,
    size: int,
    order: str,
    where: str,
) -> None:
    """What Brackup got wrong: digests of one read stored with the data of another."""
    names = ("1 changes", "2 true") if order == "changing first" else ("2 changes", "1 true")
    changes, true = names
    script = [{**rule, "seed": "B"} for rule in rewritten(1, where=where)]
    scene = scripted.scene({changes: {"seed": "A", "size": size, "rules": script}})
    first = backups.back_up(scene, attempts=1)
    later = scripted.scene({true: {"seed": "A", "size": size}, "b": {"seed": "B", "size": size}})
    second = backups.back_up(later)
    both = scripted.scene(
        {
            changes: {"seed": "A", "size": size, "rules": script},
            true: {"seed": "A", "size": size},
        }
    )
    third = backups.back_up(both, attempts=1)
    backups.assert_is_intact()

    captured, _ = scripted.served(scene / changes)[1, 1]
    restored = first.restore(tmp_path / "first") / scene.relative_to("/") / changes
    assert blake3(restored.read_bytes()).hexdigest() == captured
    restored = second.restore(tmp_path / "second") / later.relative_to("/")
    assert (restored / true).read_bytes() == content("A", size)
    assert (restored / "b").read_bytes() == content("B", size)
    restored = third.restore(tmp_path / "third") / both.relative_to("/")
    assert (restored / true).read_bytes() == content("A", size)
    assert blake3((restored / changes).read_bytes()).hexdigest() == captured
