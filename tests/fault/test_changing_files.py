"""Files that change at an exact read: what is captured, reported and restored.

The matrix is what happens × how large the file is × when it happens × whether the later attempts find
the file calm. What the scripted source handed out is the witness of what must have been captured.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from casfs.format.tree import (
    CaptureState,
    ChangeReason,
    Node,
    NodeType,
    capture_of,
    captured_digest,
)
from casfs.monitor import ProblemKind
from tests.support.capturing import BackupFixture, PublishedBackup
from tests.support.scripted_source import STEP, ScriptedSource, content

pytestmark = [pytest.mark.fuse, pytest.mark.usefixtures("no_pauses")]

SIZES = {"one chunk": 200_000, "many chunks": 3_000_000, "sparse": 400_000}
ENCRYPTED = ", encrypted"
SCENES = (*SIZES, "many chunks" + ENCRYPTED)
MOMENTS = ("before", "between", "after", "witness")
LAST_LOOK = 4
"""Three attempts, and one more at the end of the backup."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a cell of the matrix must give; `content` names what a restore must give."""

    content: str
    state: CaptureState = CaptureState.STABLE
    reason: ChangeReason = ChangeReason.NONE
    attempts: int = 1


OLD = Outcome("old")
READ_AS_NEW = Outcome("new")
ABSENT = Outcome("absent")


def after_two(text: str, reason: ChangeReason) -> Outcome:
    return Outcome(text, CaptureState.STABLE, reason, 2)


def never_stable(reason: ChangeReason) -> Outcome:
    return Outcome("served", CaptureState.CHANGED, reason, LAST_LOOK)


APPENDED = Outcome("old", CaptureState.APPENDED, ChangeReason.GREW)
HALVED_ONCE = after_two("half", ChangeReason.SHRANK)
EMPTIED = after_two("nothing", ChangeReason.SHRANK)
REWRITTEN_ONCE = after_two("new", ChangeReason.REWRITTEN)
REPLACED_ONCE = after_two("new", ChangeReason.REPLACED)
REPLACED_ALWAYS = Outcome("served", CaptureState.STABLE, ChangeReason.REPLACED, 3)
VANISHED = Outcome("old", CaptureState.STABLE, ChangeReason.VANISHED)
UNREAD_ONCE = after_two("old", ChangeReason.READ_ERROR)

# change → for each moment, what it comes to where the later attempts are calm, and where they are not
EXPECTED: dict[str, tuple[tuple[Outcome, Outcome], ...]] = {
    "append": ((APPENDED, APPENDED),) * 3 + ((OLD, OLD),),
    "truncate": ((Outcome("half"),) * 2,) + ((HALVED_ONCE, never_stable(ChangeReason.SHRANK)),) * 3,
    "empty": ((Outcome("nothing"),) * 2,) + ((EMPTIED, EMPTIED),) * 3,
    "rewrite": ((READ_AS_NEW, Outcome("served")),)
    + ((REWRITTEN_ONCE, never_stable(ChangeReason.REWRITTEN)),) * 3,
    "rewrite, mtime put back": ((READ_AS_NEW, Outcome("served")),)
    + ((REWRITTEN_ONCE, never_stable(ChangeReason.REWRITTEN)),) * 3,
    "rename over": ((REPLACED_ONCE, REPLACED_ALWAYS),) * 3 + ((OLD, OLD),),
    "unlink": ((VANISHED, VANISHED),) * 3 + ((OLD, OLD),),
    "fifo": ((Outcome("fifo"),) * 2,) * 3 + ((OLD, OLD),),
    "symlink": ((Outcome("symlink"),) * 2,) * 3 + ((OLD, OLD),),
    "directory": ((Outcome("directory"),) * 2,) * 3 + ((OLD, OLD),),
    "chmod": ((OLD, OLD),) * 4,
    "read error": ((ABSENT, ABSENT),) * 2
    + ((OLD, OLD), (UNREAD_ONCE, never_stable(ChangeReason.READ_ERROR))),
}


def rules(change: str, moment: str, calm: bool, size: int) -> list[dict[str, Any]]:
    """Return the script of a cell; a witness read needs an earlier change."""
    opening = 1 if calm else 0
    what = {"change": change, "seed": "new", "size": 1000 if change == "append" else size}
    if moment != "witness":
        return [{"opening": opening, "reading": 1, "where": moment, **what}]
    return [
        {"opening": opening, "reading": 1, "where": "after", "change": "touch"},
        {"opening": opening, "reading": 2, "where": "between", **what},
    ]


@pytest.mark.parametrize("calm", [True, False], ids=["then calm", "never calm"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("size", SCENES)
@pytest.mark.parametrize("change", EXPECTED)
def test_a_changing_file_is_recorded_with_the_state_of_its_capture(
    scripted: ScriptedSource,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    change: str,
    size: str,
    moment: str,
    calm: bool,
) -> None:
    how = "encrypted_backups" if size.endswith(ENCRYPTED) else "backups"
    backups: BackupFixture = request.getfixturevalue(how)
    size_bytes = SIZES[size.removesuffix(ENCRYPTED)]
    script = rules(change, moment, calm, size_bytes)
    spec = {"seed": "old", "size": size_bytes, "sparse": size == "sparse", "rules": script}
    file = scripted.scene({"file": spec, "other": {"seed": "other", "size": 5}}) / "file"
    backup = backups.back_up(file.parent)
    outcome = EXPECTED[change][MOMENTS.index(moment)][0 if calm else 1]

    assert backup.exit == exit_for(outcome)
    assert backup.flagged == (outcome.state == CaptureState.CHANGED)
    check_problem(backup, file, outcome)
    restored = backup.restore(tmp_path / "target") / file.relative_to("/")
    node = backup.node(file)
    if outcome.content in ("absent", "fifo", "symlink", "directory"):
        check_other_kind(node, restored, outcome.content)
        if outcome.content == "directory":
            inside = (restored / "inside").read_bytes()
            assert inside == content("new" if calm else "new1", size_bytes)
    else:
        assert node is not None
        check_file(node, restored, scripted.served(file), outcome, size_bytes)
        check_shown(backup, file, restored.read_bytes(), outcome)
        unreadable = change == "chmod" and moment != "witness"
        assert node.mode == (0 if unreadable else 0o644)
    backups.assert_is_intact()


def exit_for(outcome: Outcome) -> int:
    if outcome is ABSENT:
        return 3
    return 4 if outcome.state == CaptureState.CHANGED else 0


def check_problem(backup: PublishedBackup, file: Path, outcome: Outcome) -> None:
    """Require that the file is reported once, with what a user needs to know."""
    problem = backup.problem(file)
    stats = backup.result.snapshot.stats
    assert stats.unreadable == (outcome is ABSENT)
    assert stats.vanished == (outcome is VANISHED)
    if outcome is ABSENT:
        assert problem is not None and problem.kind == ProblemKind.UNREADABLE
        return
    kinds = {CaptureState.CHANGED: ProblemKind.CHANGED, CaptureState.APPENDED: ProblemKind.APPENDED}
    kind = ProblemKind.VANISHED if outcome is VANISHED else kinds.get(outcome.state)
    assert (problem.kind if problem is not None else None) == kind
    if problem is None:
        return
    node = backup.file(file)
    captured, capture = captured_digest(node), capture_of(node)
    assert captured is not None and capture is not None
    assert problem.details == {
        "state": outcome.state.name.lower(),
        "reason": outcome.reason.name.lower().replace("_", " "),
        "attempts": outcome.attempts,
        "captured": captured.hex(),
        "observed": capture.observed.hex() if capture.observed is not None else None,
    }


def check_other_kind(node: Node | None, restored: Path, kind: str) -> None:
    if kind == "absent":
        assert node is None
        assert not restored.exists()
        return
    assert node is not None
    mode = restored.lstat().st_mode
    if kind == "fifo":
        assert node.kind == NodeType.FIFO and stat.S_ISFIFO(mode)
    elif kind == "symlink":
        assert node.kind == NodeType.SYMLINK and restored.readlink() == Path("somewhere else")
    else:
        assert node.kind == NodeType.DIRECTORY


def check_file(
    node: Node,
    restored: Path,
    served: dict[tuple[int, int], tuple[str, int]],
    outcome: Outcome,
    size: int,
) -> None:
    """Compare state, evidence, both digests and the restored bytes with what was handed out."""
    capture = capture_of(node)
    captured = captured_digest(node)
    assert captured is not None
    found = (
        CaptureState(node.state),
        ChangeReason(capture.reason) if capture is not None else ChangeReason.NONE,
        capture.attempts if capture is not None else 1,
    )
    assert found == (outcome.state, outcome.reason, outcome.attempts)
    data = restored.read_bytes()
    assert blake3(data).digest() == captured
    assert len(data) == node.size
    expected = {
        "old": content("old", size),
        "new": content("new", size),
        "half": content("old", size)[: size // 2],
        "nothing": b"",
    }
    if outcome.content in expected:
        assert data == expected[outcome.content]
    # Of an empty file nothing is read, and so nothing is in the source's own account.
    opening = outcome.attempts
    assert served.get((opening, 1), (blake3().hexdigest(), 0)) == (captured.hex(), len(data))
    observed = capture.observed if capture is not None else None
    if outcome.state == CaptureState.STABLE or outcome.reason == ChangeReason.READ_ERROR:
        assert observed is None
    else:
        assert observed is not None
        assert served[opening, 2][0] == observed.hex()


def check_shown(backup: PublishedBackup, file: Path, restored: bytes, outcome: Outcome) -> None:
    """Require that a mount shows the same bytes as a restore gives, and the same of the capture."""
    shown = backup.shown(file)
    node = backup.file(file)
    captured, capture = captured_digest(node), capture_of(node)
    assert shown is not None and captured is not None
    data, known = shown
    assert data == restored
    observed = capture.observed if capture is not None else None
    assert known == {
        "capture": outcome.state.name.lower(),
        "captured": captured.hex(),
        "observed": (observed or captured).hex(),
        "reason": outcome.reason.name.lower().replace("_", " "),
        "attempts": str(outcome.attempts),
    }


def test_the_matrix_reads_files_in_several_steps_and_cuts_the_large_ones(
    scripted: ScriptedSource, backups: BackupFixture
) -> None:
    """What the names of the sizes say is so, and a file that does not change is read once."""
    spec = {name: {"seed": name, "size": size} for name, size in SIZES.items()}
    scene = scripted.scene(spec)
    backup = backups.back_up(scene)
    assert backup.exit == 0 and backup.problems == []
    chunks = {
        name: len(list(backups.repository.content(backup.file(scene / name)).blobs()))
        for name in SIZES
    }
    assert chunks["one chunk"] == 1
    assert chunks["many chunks"] > 1
    for name, size in SIZES.items():
        assert size > 8 * STEP
        assert scripted.served(scene / name).keys() == {(1, 1)}
        assert backup.file(scene / name).extra is None


def test_what_abandoned_attempts_stored_is_reported(
    backups: BackupFixture, scripted: ScriptedSource
) -> None:
    rewrite = {"opening": 0, "reading": 1, "where": "between", "change": "rewrite", "seed": "n"}
    small, large = SIZES["one chunk"], SIZES["many chunks"]
    files = {
        "small": {"seed": "s", "size": small, "rules": [rewrite]},
        "large": {"seed": "l", "size": large, "rules": [rewrite]},
        "calm": {"seed": "c", "size": large},
    }
    folder = scripted.scene(files)
    found = backups.back_up(folder)
    stored_bytes = found.result.snapshot.stats.new_plain_bytes
    assert stored_bytes > 5 * large
    # The last attempt is kept. A file of one chunk is stored after its attempts, and after the last look.
    assert found.result.abandoned_bytes == (LAST_LOOK - 1) * large + small
    assert backups.back_up(folder / "calm").result.abandoned_bytes == 0
