"""Restore: intact files come back, damage is reported, and nothing outside the target is touched."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from casfs.digest import Digest, digest_of
from casfs.errors import NotFoundError
from casfs.format.codec import BlobKind
from casfs.format.tree import Node, NodeExtra, NodeType, TreeRef
from casfs.monitor import Problem, ProblemKind, Progress, RecordingMonitor
from casfs.patterns import parse_pattern
from casfs.restore import restorer as restorer_module
from casfs.restore import target_fs as target_fs_module
from casfs.restore.entry_writer import Overwrite
from casfs.restore.ordered_pool import DEFAULT_LIMITS, PoolLimits
from casfs.restore.restorer import RestoreOptions, Restorer, RestoreResult
from casfs.trees.content import EXTENT, HOLE, ContentWriter
from tests.support.builders import (
    MTIME_NS,
    Plan,
    RepositoryFixture,
    TreeFixture,
    entry,
    file,
    flagged,
    reference,
)
from tests.support.stores import noise

CHUNKS = [noise(f"chunk {number}", 3000) for number in range(4)]
WHOLE = b"".join(CHUNKS)


@dataclass(frozen=True, slots=True)
class Restored:
    """The result of one restore, and the problems that it reported."""

    result: RestoreResult
    problems: list[Problem]

    def reported(self, kind: ProblemKind) -> list[bytes]:
        return [problem.path for problem in self.problems if problem.kind == kind]


class RestoreCase:
    """A repository, a target, and a folder beside the target that nothing may touch."""

    def __init__(self, folder: Path) -> None:
        self.repo = RepositoryFixture(folder)
        self.limits = DEFAULT_LIMITS
        self.progress = Progress()
        self.target = folder / "target"
        self.outside = folder / "outside"
        self.outside.mkdir()
        (self.outside / "precious").write_bytes(b"do not touch")

    def store(self, *chunks: bytes) -> None:
        with self.repo.writing() as repository:
            writer = repository.writer()
            for chunk in chunks:
                writer.put(BlobKind.DATA, digest_of(chunk), chunk)
            writer.finish()

    def publish(self, plan: Plan) -> None:
        self.repo.publish(plan)

    def restore(self, spec: str = "latest", with_root: bool = False, **options: Any) -> Restored:
        monitor = RecordingMonitor()
        monitor.progress = self.progress
        for name in {"include", "exclude"} & set(options):
            options[name] = tuple(parse_pattern(text.encode()) for text in options[name])
        with self.repo.reading() as repository:
            _, _, path, node = repository.snapshots.resolve_path(spec)
            restorer = Restorer(repository, RestoreOptions(**options), monitor, limits=self.limits)
            result = restorer.restore(path, node, bytes(self.target), with_root)
        return Restored(result, monitor.problems)

    def untouched(self) -> bool:
        """Return whether nothing outside the target was added or changed."""
        return os.listdir(self.outside) == ["precious"] and (
            (self.outside / "precious").read_bytes() == b"do not touch"
        )

    def found(self) -> dict[str, bytes | None]:
        """Return the entries of the target: the content of files, None for anything else."""
        return {
            str(path.relative_to(self.target)): path.read_bytes()
            if path.is_file() and not path.is_symlink()
            else None
            for path in sorted(self.target.rglob("*"))
        }


def of_chunks(*chunks: bytes, **fields: Any) -> Node:
    whole = b"".join(chunks)
    records = b"".join(EXTENT.pack(len(chunk), digest_of(chunk)) for chunk in chunks)
    known: dict[str, Any] = {
        "size": len(whole),
        "content": records,
        "captured": digest_of(whole),
    }
    return entry(b"", **(known | fields))


@pytest.fixture
def case(tmp_path: Path) -> RestoreCase:
    return RestoreCase(tmp_path)


TREE: Plan = {b"d": {b"e": {b"deep": b"3"}, b"f": b"22"}, b"\xff\n": b"1", b"empty": {}}
TREE_FOUND = {
    "d": None,
    "d/e": None,
    "d/e/deep": b"3",
    "d/f": b"22",
    "\udcff\n": b"1",
    "empty": None,
}


class TestRestoredContent:
    def test_restore_writes_a_whole_snapshot(self, case: RestoreCase) -> None:
        case.publish(TREE)
        done = case.restore()
        assert case.found() == TREE_FOUND
        assert done.problems == []
        result = done.result
        assert (result.files, result.directories, result.restored_bytes) == (3, 3, 4)
        assert (result.damaged, result.failed, result.skipped, result.deleted) == (0, 0, 0, 0)

    def test_restore_writes_a_directory_straight_into_the_target(self, case: RestoreCase) -> None:
        case.publish(TREE)
        case.restore("latest:d")
        assert case.found() == {"e": None, "e/deep": b"3", "f": b"22"}

    def test_restore_reports_progress_up_to_the_last_entry(self, case: RestoreCase) -> None:
        case.publish(
            {b"d": {b"f": b"1", b"empty": {}}, b"g": b"2", b"l": entry(b"l", NodeType.FIFO)}
        )
        with case.repo.reading() as repository:
            _, snapshot = repository.snapshots.resolve("latest")
            monitor = RecordingMonitor()
            restorer = Restorer(repository, RestoreOptions(), monitor)
            restorer.restore(b"", snapshot.root, os.fsencode(case.target), False)
        assert snapshot.root.tree is not None
        assert monitor.progress.items == snapshot.root.tree.nodes == 5

    def test_restore_writes_a_single_file_under_its_name(self, case: RestoreCase) -> None:
        case.publish(TREE)
        assert case.restore("latest:d/e/deep", delete=True).result.files == 1
        assert case.found() == {"deep": b"3"}

    def test_restore_makes_the_holes_of_a_sparse_file(self, case: RestoreCase) -> None:
        case.store(*CHUNKS)
        whole = bytes(1 << 22) + CHUNKS[0] + bytes(1 << 22)
        records = (
            EXTENT.pack(1 << 22, HOLE)
            + EXTENT.pack(3000, digest_of(CHUNKS[0]))
            + EXTENT.pack(1 << 22, HOLE)
        )
        sparse = entry(b"", size=len(whole), content=records, captured=digest_of(whole))
        case.publish({b"s": sparse, b"f": of_chunks(*CHUNKS)})
        assert case.restore(verify=True).result.verified == 2
        assert case.found() == {"s": whole, "f": WHOLE}
        assert (case.target / "s").stat().st_blocks * 512 < 1 << 20

    def test_restore_dry_run_counts_and_writes_nothing(self, case: RestoreCase) -> None:
        case.publish(TREE)
        result = case.restore(dry_run=True, delete=True).result
        assert (result.files, result.directories, result.restored_bytes) == (3, 3, 4)
        assert not case.target.exists()

    def test_restore_leaves_no_temporary_file(self, case: RestoreCase) -> None:
        case.publish(TREE)
        for overwrite in Overwrite:
            case.restore(overwrite=overwrite)
            assert case.found() == TREE_FOUND

    def test_restore_handles_trees_deeper_than_the_recursion_limit(self, case: RestoreCase) -> None:
        depth = sys.getrecursionlimit() + 100
        allow_open_files(depth + 200)
        trees = TreeFixture()
        node = trees.build({b"f": b"", b"g": b""})
        for _ in range(depth - 1):
            node = trees.build({b"d": node})
        case.store(*trees.blobs.values())
        case.publish({b"d": node})
        try:
            assert case.restore(include=("f",)).result.files == 1
            assert case.restore().result.files == 2
            fd = os.open(case.target, os.O_RDONLY)
            for _ in range(depth):
                below = os.open("d", os.O_RDONLY, dir_fd=fd)
                os.close(fd)
                fd = below
            assert sorted(os.listdir(fd)) == ["f", "g"]
            os.close(fd)
        finally:
            # What pytest would remove it with recurses.
            subprocess.run(["rm", "-rf", case.target], check=True)


def allow_open_files(count: int) -> None:
    """Raise this process's limit, as the command does for itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


class TestRestoredMetadata:
    def test_restore_sets_times_modes_and_types(self, case: RestoreCase) -> None:
        when = {"a": -1_000_000_001, "b": 4_000_000_000_123_456_789}
        case.publish(
            {
                b"a": file(b"", mode=0o4711, mtime_ns=when["a"]),
                b"b": entry(b"", NodeType.SYMLINK, content=b"nowhere", mtime_ns=when["b"]),
                b"fifo": entry(b"", NodeType.FIFO, mode=0o640),
                b"socket": entry(b"", NodeType.SOCKET, mode=0o600),
                b"d": {b"f": b""},
            }
        )
        done = case.restore(with_root=True)
        assert done.problems == []
        look = {path.name: path.lstat() for path in case.target.rglob("*")}
        assert stat.S_IMODE(look["a"].st_mode) == 0o4711
        assert {name: look[name].st_mtime_ns for name in when} == when
        assert os.readlink(case.target / "b") == "nowhere"
        assert stat.S_ISFIFO(look["fifo"].st_mode) and stat.S_ISSOCK(look["socket"].st_mode)
        assert stat.S_IMODE(look["fifo"].st_mode) == 0o640
        assert stat.S_IMODE(look["d"].st_mode) == stat.S_IMODE(case.target.stat().st_mode) == 0o755
        assert look["d"].st_mtime_ns == case.target.stat().st_mtime_ns == MTIME_NS

    def test_restore_changes_the_metadata_of_the_target_only_when_asked(
        self, case: RestoreCase
    ) -> None:
        case.target.mkdir(mode=0o750)
        case.publish({b"f": b""})
        case.restore()
        assert stat.S_IMODE(case.target.stat().st_mode) == 0o750

    def test_restore_replaces_the_xattrs_of_an_old_entry(self, case: RestoreCase) -> None:
        extra = NodeExtra(((b"user.a", b"\0value"), (b"user.b", b"")))
        case.publish({b"f": file(b"", extra=extra), b"d": {}})
        case.restore()
        os.setxattr(case.target / "d", "user.old", b"x")
        os.removexattr(case.target / "f", "user.b")
        case.restore(overwrite=Overwrite.IF_CHANGED)
        assert os.getxattr(case.target / "f", "user.a") == b"\0value"
        assert sorted(os.listxattr(case.target / "f")) == ["user.a", "user.b"]
        assert os.listxattr(case.target / "d") == []

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it gives files to other users")
    def test_restore_as_root_sets_owners_and_devices(self, case: RestoreCase) -> None:
        device = os.makedev(1, 3)
        case.publish(
            {
                b"f": file(b"", uid=1234, gid=4_294_967_294, mode=0o6755),
                b"null": entry(
                    b"", NodeType.CHARACTER_DEVICE, mode=0o666, extra=NodeExtra(rdev=device)
                ),
            }
        )
        assert case.restore().problems == []
        look = (case.target / "f").stat()
        assert (look.st_uid, look.st_gid) == (1234, 4_294_967_294)
        assert stat.S_IMODE(look.st_mode) == 0o6755
        assert (case.target / "null").stat().st_rdev == device

    def test_restore_reports_refused_metadata_and_keeps_the_file(self, case: RestoreCase) -> None:
        case.publish({b"f": file(b"", extra=NodeExtra(((b"nonsense.x", b""),)), mode=0o600)})
        done = case.restore()
        assert case.found() == {"f": b""}
        if os.geteuid() == 0:
            assert done.reported(ProblemKind.METADATA) == [b"f"]


class TestNothingOutsideTarget:
    """The target may hold symlinks, and the snapshot may be hostile: nothing is followed."""

    def test_restore_replaces_a_symlink_in_place_of_a_directory(self, case: RestoreCase) -> None:
        case.publish({b"d": {b"precious": b"evil", b"new": b"evil"}})
        case.target.mkdir()
        (case.target / "d").symlink_to(case.outside)
        case.restore(delete=True)
        assert case.untouched()
        assert not (case.target / "d").is_symlink()
        assert case.found() == {"d": None, "d/new": b"evil", "d/precious": b"evil"}

    def test_restore_replaces_a_symlink_in_place_of_a_file(self, case: RestoreCase) -> None:
        case.publish({b"f": b"evil", b"fifo": entry(b"", NodeType.FIFO)})
        case.target.mkdir()
        for name in ("f", "fifo"):
            (case.target / name).symlink_to(case.outside / "precious")
        case.restore()
        assert case.untouched()
        assert (case.target / "f").read_bytes() == b"evil"

    def test_restore_does_not_follow_a_symlink_that_an_earlier_restore_made(
        self, case: RestoreCase
    ) -> None:
        case.publish({b"d": entry(b"", NodeType.SYMLINK, content=bytes(case.outside))})
        case.restore()
        assert (case.target / "d").resolve() == case.outside
        case.publish({b"d": {b"precious": b"evil"}})
        for overwrite in (Overwrite.IF_CHANGED, Overwrite.ALWAYS):
            case.restore(overwrite=overwrite, delete=True)
            assert case.untouched()

    def test_restore_skips_everything_below_a_symlink_that_it_may_not_replace(
        self, case: RestoreCase
    ) -> None:
        case.publish({b"d": {b"precious": b"evil"}})
        case.target.mkdir()
        (case.target / "d").symlink_to(case.outside)
        result = case.restore(overwrite=Overwrite.NEVER, delete=True).result
        assert case.untouched()
        assert (case.target / "d").is_symlink()
        assert (result.files, result.skipped) == (0, 1)

    def test_restore_with_delete_follows_no_symlink(self, case: RestoreCase) -> None:
        case.publish({b"f": b""})
        (case.target / "old").mkdir(parents=True)
        (case.target / "link").symlink_to(case.outside)
        (case.target / "old" / "link").symlink_to(case.outside)
        assert case.restore(delete=True).result.deleted == 2
        assert case.untouched()
        assert case.found() == {"f": b""}

    def test_restore_does_not_follow_a_symlink_swapped_in_during_its_run(
        self, case: RestoreCase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case.publish({b"d": {b"precious": b"evil"}})
        create_file = target_fs_module.create_file

        def swap(*arguments: Any) -> Any:
            (case.target / "d").rename(case.target / "moved")
            (case.target / "d").symlink_to(case.outside)
            return create_file(*arguments)

        monkeypatch.setattr(target_fs_module, "create_file", swap)
        case.restore()
        assert case.untouched()
        assert (case.target / "moved" / "precious").read_bytes() == b"evil"

    def test_restore_does_not_change_other_hard_links_of_a_replaced_file(
        self, case: RestoreCase
    ) -> None:
        case.publish({b"f": b"new"})
        case.target.mkdir()
        os.link(case.outside / "precious", case.target / "f")
        case.restore()
        assert case.untouched()
        assert case.found() == {"f": b"new"}

    @pytest.mark.parametrize("name", [b"..", b".", b"a/../../outside/precious", b"", b"x\0"])
    def test_restore_refuses_a_whole_directory_with_a_hostile_name(
        self, case: RestoreCase, name: bytes
    ) -> None:
        from casfs.format.tree import Leaf, encode_piece

        with case.repo.writing() as repository:
            writer = repository.writer()
            leaf = encode_piece(Leaf([file(name, b"evil")]))
            writer.put(BlobKind.TREE, digest_of(leaf), leaf)
            writer.put(BlobKind.DATA, digest_of(b"evil"), b"evil")
            writer.finish()
        hostile = entry(b"", NodeType.DIRECTORY, tree=TreeRef(digest_of(leaf), 1, 4, 0))
        case.publish({b"d": hostile, b"f": b"sound"})
        done = case.restore(delete=True)
        assert case.untouched()
        assert case.found() == {"d": None, "f": b"sound"}
        assert done.reported(ProblemKind.DAMAGED) == [b"d"]


class TestRestoredHardLinks:
    def linked(self, content: bytes, **fields: Any) -> Node:
        known = {"inode": 9, "nlink": 2, "extra": NodeExtra(device=3)}
        return file(b"", content, **(known | fields))

    def inodes(self, case: RestoreCase) -> dict[str, int]:
        return {
            str(path.relative_to(case.target)): path.lstat().st_ino
            for path in case.target.rglob("*")
            if not path.is_dir()
        }

    def test_restore_links_files_across_directories(self, case: RestoreCase) -> None:
        case.store(b"x")
        other = self.linked(b"x", extra=NodeExtra(device=4))
        case.publish({b"a": {b"f": self.linked(b"x")}, b"b": self.linked(b"x"), b"c": other})
        done = case.restore()
        inodes = self.inodes(case)
        assert inodes["a/f"] == inodes["b"] != inodes["c"]
        assert (case.target / "b").stat().st_nlink == 2
        assert done.result.files == 3

    def test_restore_links_entries_that_are_no_files(self, case: RestoreCase) -> None:
        fields: dict[str, Any] = {"inode": 9, "nlink": 2, "extra": NodeExtra(device=3)}
        case.publish(
            {
                b"a": entry(b"", NodeType.FIFO, **fields),
                b"b": entry(b"", NodeType.FIFO, **fields),
                b"c": entry(b"", NodeType.SYMLINK, content=b"t", **(fields | {"inode": 5})),
                b"d": entry(b"", NodeType.SYMLINK, content=b"t", **(fields | {"inode": 5})),
            }
        )
        case.restore()
        inodes = self.inodes(case)
        assert inodes["a"] == inodes["b"]
        assert inodes["c"] == inodes["d"]

    def test_restore_does_not_link_files_with_different_content(self, case: RestoreCase) -> None:
        case.store(b"x", b"y")
        case.publish({b"a": self.linked(b"x"), b"b": self.linked(b"y")})
        assert case.restore().problems == []
        assert case.found() == {"a": b"x", "b": b"y"}

    @pytest.mark.parametrize("overwrite", list(Overwrite))
    def test_restore_links_a_missing_name_again(
        self, case: RestoreCase, overwrite: Overwrite
    ) -> None:
        case.store(b"x")
        case.publish({b"a": self.linked(b"x"), b"b": self.linked(b"x")})
        case.restore()
        (case.target / "b").unlink()
        case.restore(overwrite=overwrite)
        inodes = self.inodes(case)
        assert case.found() == {"a": b"x", "b": b"x"}
        assert (inodes["a"] == inodes["b"]) is (overwrite != Overwrite.NEVER)

    @pytest.mark.parametrize("overwrite", [Overwrite.ALWAYS, Overwrite.IF_CHANGED])
    def test_restore_separates_hard_links_that_the_snapshot_does_not_have(
        self, case: RestoreCase, overwrite: Overwrite
    ) -> None:
        case.publish({b"a": file(b"", b"x"), b"b": file(b"", b"x")})
        case.store(b"x")
        case.restore()
        (case.target / "b").unlink()
        os.link(case.target / "a", case.target / "b")
        case.restore(overwrite=overwrite)
        inodes = self.inodes(case)
        assert inodes["a"] != inodes["b"]
        assert case.found() == {"a": b"x", "b": b"x"}

    def test_restore_keeps_existing_hard_links(self, case: RestoreCase) -> None:
        case.store(b"x")
        case.publish({b"a": self.linked(b"x"), b"b": self.linked(b"x")})
        case.restore()
        before = self.inodes(case)
        assert case.restore(overwrite=Overwrite.IF_CHANGED).result.skipped == 2
        assert self.inodes(case) == before
        case.restore()
        inodes = self.inodes(case)
        assert sorted(inodes) == ["a", "b"]
        assert inodes["a"] == inodes["b"]


class TestOverwrite:
    @pytest.fixture
    def twice(self, case: RestoreCase) -> RestoreCase:
        """A bench whose target holds what was restored, changed in three ways."""
        case.publish({b"same": b"1", b"newer": b"2", b"longer": b"3", b"missing": b"4"})
        case.restore()
        os.utime(case.target / "newer", ns=(0, MTIME_NS + 1))
        (case.target / "longer").write_bytes(b"3 and more")
        os.utime(case.target / "longer", ns=(0, MTIME_NS))
        (case.target / "missing").unlink()
        # Behind the same size and time, only `always` finds this.
        (case.target / "same").write_bytes(b"X")
        os.utime(case.target / "same", ns=(0, MTIME_NS))
        return case

    def test_overwrite_always_replaces_everything(self, twice: RestoreCase) -> None:
        result = twice.restore().result
        assert (result.files, result.skipped) == (4, 0)
        assert twice.found() == {"same": b"1", "newer": b"2", "longer": b"3", "missing": b"4"}

    def test_overwrite_if_changed_skips_files_of_equal_size_and_time(
        self, twice: RestoreCase
    ) -> None:
        result = twice.restore(overwrite=Overwrite.IF_CHANGED).result
        assert (result.files, result.skipped) == (3, 1)
        assert twice.found() == {"same": b"X", "newer": b"2", "longer": b"3", "missing": b"4"}

    def test_overwrite_never_skips_every_existing_file(self, twice: RestoreCase) -> None:
        result = twice.restore(overwrite=Overwrite.NEVER).result
        assert (result.files, result.skipped) == (1, 3)
        assert twice.found() == {
            "same": b"X",
            "newer": b"2",
            "longer": b"3 and more",
            "missing": b"4",
        }

    def test_restore_dry_run_reports_what_would_be_skipped_deleted_and_in_the_way(
        self, twice: RestoreCase
    ) -> None:
        (twice.target / "missing").mkdir()
        (twice.target / "missing/something").touch()
        (twice.target / "other").mkdir()
        (twice.target / "other/file").touch()
        before = twice.found()
        for how in (
            {"overwrite": Overwrite.IF_CHANGED},
            {"overwrite": Overwrite.NEVER, "delete": True},
            {"delete": True},
        ):
            dry = twice.restore(dry_run=True, **how)
            assert twice.found() == before
            counts = dry.result
            if how == {"overwrite": Overwrite.IF_CHANGED}:
                assert (counts.files, counts.skipped, counts.deleted) == (2, 1, 0)
                assert (counts.failed, dry.reported(ProblemKind.UNREADABLE)) == (1, [b"missing"])
            elif "overwrite" in how:
                assert (counts.files, counts.skipped, counts.deleted) == (0, 4, 1)
            else:
                # The folder in the way of a file is deleted with what is in it.
                assert (counts.files, counts.skipped, counts.deleted) == (4, 0, 2)
        wet = twice.restore(delete=True).result
        assert (wet.files, wet.skipped, wet.deleted) == (4, 0, 2)

    def test_overwrite_if_changed_sets_the_metadata_of_skipped_files(
        self, case: RestoreCase
    ) -> None:
        case.publish({b"f": b"1"})
        case.restore()
        os.chmod(case.target / "f", 0o777)
        case.restore(overwrite=Overwrite.IF_CHANGED)
        assert stat.S_IMODE((case.target / "f").stat().st_mode) == 0o644

    def test_restore_replaces_a_full_directory_only_with_delete(self, case: RestoreCase) -> None:
        case.publish({b"x": b"file", b"y": b"file"})
        (case.target / "x").mkdir(parents=True)
        (case.target / "x" / "kept").write_bytes(b"")
        done = case.restore()
        assert done.result.failed == 1
        assert done.reported(ProblemKind.UNREADABLE) == [b"x"]
        assert case.found() == {"x": None, "x/kept": b"", "y": b"file"}
        assert case.restore(delete=True).result.failed == 0
        assert case.found() == {"x": b"file", "y": b"file"}

    def test_restore_replaces_an_empty_directory_with_a_file(self, case: RestoreCase) -> None:
        case.publish({b"x": b"file"})
        (case.target / "x").mkdir(parents=True)
        assert case.restore().result.failed == 0
        assert case.found() == {"x": b"file"}

    def test_restore_replaces_a_file_with_a_directory(self, case: RestoreCase) -> None:
        case.publish({b"x": {b"f": b""}})
        case.target.mkdir()
        (case.target / "x").write_bytes(b"file")
        case.restore()
        assert case.found() == {"x": None, "x/f": b""}


class TestRestorePatterns:
    def test_include_restores_matches_and_their_parent_directories(self, case: RestoreCase) -> None:
        case.publish(TREE)
        result = case.restore(include=("deep",)).result
        assert case.found() == {"d": None, "d/e": None, "d/e/deep": b"3"}
        assert result.files == 1
        assert (case.target / "d").stat().st_mtime_ns == MTIME_NS

    def test_include_of_a_directory_restores_everything_in_it(self, case: RestoreCase) -> None:
        case.publish(TREE)
        case.restore(include=("/d/",), exclude=("f",))
        assert case.found() == {"d": None, "d/e": None, "d/e/deep": b"3"}

    def test_include_that_matches_nothing_is_an_error(self, case: RestoreCase) -> None:
        case.publish(TREE)
        with pytest.raises(NotFoundError, match="nothing matches --include 'none', '/e'; nothing"):
            case.restore(include=("none", "/e"))
        assert case.found() == {}

    def test_patterns_that_leave_nothing_over_are_an_error(self, case: RestoreCase) -> None:
        case.publish(TREE)
        with pytest.raises(NotFoundError, match="exclude everything; nothing was restored"):
            case.restore(exclude=("*",))
        with pytest.raises(NotFoundError, match="nothing that is not excluded matches"):
            case.restore(include=("deep",), exclude=("d/",))
        assert case.found() == {}

    def test_a_pattern_that_matches_nothing_is_reported(self, case: RestoreCase) -> None:
        case.publish(TREE)
        done = case.restore(include=("deep", "none"), exclude=("d/f", "*.o", "!*.h"))
        found = [
            problem for problem in done.problems if problem.kind == ProblemKind.UNMATCHED_PATTERN
        ]
        assert [tuple(problem.details.values()) for problem in found] == [
            ("--include", "none"),
            ("--exclude", "*.o"),
            ("--exclude", "!*.h"),
        ]
        assert done.result.files == 1

    def test_patterns_below_an_included_directory_count_as_matched(self, case: RestoreCase) -> None:
        case.publish(TREE)
        assert case.restore(include=("d", "deep")).problems == []
        assert case.restore("latest:d/e", include=("/d", "e/", "deep")).problems == []

    def test_an_exclude_that_only_protects_in_the_target_counts_as_matched(
        self, case: RestoreCase
    ) -> None:
        case.publish(TREE)
        case.restore()
        (case.target / "old").write_bytes(b"")
        assert case.restore(delete=True, exclude=("old",)).problems == []
        assert (case.target / "old").exists()

    @pytest.mark.parametrize("pattern", ["d", "/d/", "d/e", "e"])
    def test_exclude_of_the_named_path_or_one_above_it_is_an_error(
        self, case: RestoreCase, pattern: str
    ) -> None:
        case.publish(TREE)
        with pytest.raises(NotFoundError, match=f"'{pattern}' excludes the path to restore"):
            case.restore("latest:d/e", exclude=(pattern,))
        assert not case.target.exists()

    @pytest.mark.parametrize("pattern", ["d", "/d/", "d/e", "e"])
    def test_include_of_the_named_path_or_one_above_it_restores_all_of_it(
        self, case: RestoreCase, pattern: str
    ) -> None:
        case.publish(TREE)
        case.restore("latest:d/e", include=(pattern,))
        assert case.found() == {"deep": b"3"}

    def test_exclude_can_spare_what_a_later_pattern_names(self, case: RestoreCase) -> None:
        case.publish(TREE)
        case.restore(exclude=("*", "!*/", "!deep"))
        assert case.found() == {"d": None, "d/e": None, "d/e/deep": b"3", "empty": None}

    def test_exclude_leaves_out_matches(self, case: RestoreCase) -> None:
        case.publish(TREE)
        case.restore(exclude=("e/", "empty"))
        assert case.found() == {"d": None, "d/f": b"22", "\udcff\n": b"1"}

    def test_patterns_match_the_path_in_the_snapshot(self, case: RestoreCase) -> None:
        case.publish(TREE)
        case.restore("latest:d", include=("/d/e",))
        assert case.found() == {"e": None, "e/deep": b"3"}


class TestRestoreDelete:
    def test_delete_removes_what_the_snapshot_does_not_have(self, case: RestoreCase) -> None:
        case.publish(TREE)
        case.restore()
        (case.target / "d" / "old").write_bytes(b"")
        (case.target / "dir" / "below").mkdir(parents=True)
        (case.target / "dir" / "below" / "f").write_bytes(b"")
        assert case.restore().result.deleted == 0
        assert case.restore(delete=True).result.deleted == 2
        assert case.found() == TREE_FOUND

    def test_delete_keeps_what_is_excluded_or_not_included(self, case: RestoreCase) -> None:
        case.publish(TREE)
        case.restore()
        (case.target / "d" / "old.log").write_bytes(b"")
        (case.target / "old").write_bytes(b"")
        before = case.found()
        assert case.restore(delete=True, include=("/d/e/",)).result.deleted == 0
        assert case.restore(delete=True, exclude=("*.log", "old")).result.deleted == 0
        assert case.found() == before

    def test_delete_removes_nothing_in_a_damaged_directory(self, case: RestoreCase) -> None:
        case.publish({b"bad": {b"f": b"1"}, b"good": {b"g": b"2"}})
        case.restore()
        for name in ("bad/extra", "good/extra"):
            (case.target / name).write_bytes(b"")
        with case.repo.reading() as repository:
            _, _, _, node = repository.snapshots.resolve_path("latest:bad")
        case.repo.damage(reference(node))
        done = case.restore(delete=True)
        assert done.result.deleted == 1
        assert done.reported(ProblemKind.DAMAGED) == [b"bad"]
        assert case.found() == {
            "bad": None,
            "bad/extra": b"",
            "bad/f": b"1",
            "good": None,
            "good/g": b"2",
        }

    def test_delete_removes_nothing_below_a_damaged_root(self, case: RestoreCase) -> None:
        case.publish(TREE)
        case.restore()
        (case.target / "extra").write_bytes(b"")
        before = case.found()
        with case.repo.reading() as repository:
            _, _, _, node = repository.snapshots.resolve_path("latest")
        case.repo.damage(reference(node))
        result = case.restore(delete=True).result
        assert (result.deleted, result.damaged) == (0, 1)
        assert case.found() == before

    def test_delete_keeps_the_old_file_in_place_of_a_damaged_one(self, case: RestoreCase) -> None:
        case.store(*CHUNKS)
        case.publish({b"f": of_chunks(*CHUNKS)})
        case.target.mkdir()
        (case.target / "f").write_bytes(b"old")
        case.repo.damage(digest_of(CHUNKS[1]))
        assert case.restore(delete=True).result.damaged == 1
        assert case.found() == {"f": b"old"}


class TestRestoreOfDamage:
    @pytest.fixture
    def damaged(self, case: RestoreCase) -> RestoreCase:
        case.store(*CHUNKS)
        case.publish({b"bad": of_chunks(*CHUNKS), b"good": of_chunks(*CHUNKS[2:])})
        case.repo.damage(digest_of(CHUNKS[1]))
        return case

    def test_a_damaged_chunk_costs_only_its_file_and_is_reported_with_blob_and_pack(
        self, damaged: RestoreCase
    ) -> None:
        done = damaged.restore()
        assert damaged.found() == {"good": CHUNKS[2] + CHUNKS[3]}
        assert (done.result.files, done.result.damaged) == (1, 1)
        (problem,) = done.problems
        assert (problem.kind, problem.path) == (ProblemKind.DAMAGED, b"bad")
        assert problem.details["blob"] == digest_of(CHUNKS[1]).hex()
        assert isinstance(problem.details["pack"], str) and len(problem.details["pack"]) == 64

    def test_salvage_writes_zeros_for_lost_ranges_and_reports_them(
        self, damaged: RestoreCase
    ) -> None:
        done = damaged.restore(salvage=True)
        assert damaged.found()["bad"] == CHUNKS[0] + bytes(3000) + CHUNKS[2] + CHUNKS[3]
        assert (done.result.files, done.result.damaged) == (2, 1)
        (problem,) = done.problems
        assert problem.details["ranges"] == "3000-6000"
        assert "3000-6000" in problem.message

    def test_salvage_reports_damage_for_every_name_of_a_file(self, case: RestoreCase) -> None:
        case.store(*CHUNKS)
        linked = of_chunks(*CHUNKS, inode=9, nlink=2, extra=NodeExtra(device=3))
        case.publish({b"a": linked, b"b": linked})
        case.repo.damage(digest_of(CHUNKS[0]))
        done = case.restore(salvage=True)
        assert done.reported(ProblemKind.DAMAGED) == [b"a", b"b"]
        assert (case.target / "a").samefile(case.target / "b")

    def test_salvage_of_a_lost_content_list_loses_only_what_it_lists(
        self, case: RestoreCase
    ) -> None:
        with case.repo.writing() as repository:
            writer = repository.writer()
            content = ContentWriter(writer.put, digest_of)
            chunks = [b"chunk %d" % number for number in range(9000)]
            for chunk in chunks:
                writer.put(BlobKind.DATA, digest_of(chunk), chunk)
                content.add(len(chunk), digest_of(chunk))
            records, levels = content.finish()
            writer.finish()
        whole = b"".join(chunks)
        assert (levels, len(records) > 3 * EXTENT.size) == (1, True)
        node = entry(
            b"", size=len(whole), content=records, levels=levels, captured=digest_of(whole)
        )
        case.publish({b"f": node})
        (first, _), (length, digest), *_ = EXTENT.iter_unpack(records)
        case.repo.damage(Digest(digest))
        assert case.restore().result.damaged == 1
        assert case.found() == {}
        done = case.restore(salvage=True)
        end = first + length
        assert case.found() == {"f": whole[:first] + bytes(length) + whole[end:]}
        assert done.problems[0].details["ranges"] == f"{first}-{end}"

    @pytest.mark.parametrize("salvage", [False, True])
    @pytest.mark.parametrize(
        "lie",
        [
            pytest.param({"size": 11_999}, id="size too small"),
            pytest.param({"size": 12_001}, id="size too great"),
            pytest.param({"captured": bytes(32)}, id="digest of something else"),
            pytest.param({"content": b""}, id="no content"),
        ],
    )
    def test_a_file_with_a_wrong_manifest_is_not_restored(
        self, case: RestoreCase, lie: dict[str, Any], salvage: bool
    ) -> None:
        case.store(*CHUNKS)
        case.publish({b"f": of_chunks(*CHUNKS, **lie), b"good": of_chunks(CHUNKS[0])})
        done = case.restore(salvage=salvage)
        assert case.found() == {"good": CHUNKS[0]}
        assert done.reported(ProblemKind.DAMAGED) == [b"f"]

    def test_salvage_replaces_a_chunk_of_another_length_with_zeros(self, case: RestoreCase) -> None:
        case.store(*CHUNKS)
        records = EXTENT.pack(2999, digest_of(CHUNKS[0])) + EXTENT.pack(3000, digest_of(CHUNKS[1]))
        case.publish({b"f": entry(b"", size=5999, content=records, captured=bytes(32))})
        assert case.restore().result.damaged == 1
        assert case.found() == {}
        assert case.restore(salvage=True).problems[0].details["ranges"] == "0-2999"
        assert case.found() == {"f": bytes(2999) + CHUNKS[1]}

    def test_a_hostile_hole_takes_no_time(self, case: RestoreCase) -> None:
        records = EXTENT.pack((1 << 63) - 1, HOLE)
        case.publish({b"f": entry(b"", size=5, content=records, captured=bytes(32))})
        began = time.monotonic()
        assert case.restore(salvage=True).result.damaged == 1
        assert time.monotonic() - began < 30
        assert case.found() == {}

    def test_verify_finds_a_file_that_was_written_wrongly(
        self, case: RestoreCase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case.publish({b"f": b"right"})
        rename = os.rename

        def rename_and_spoil(source: bytes, target: bytes, **where: int) -> None:
            rename(source, target, **where)
            (case.target / "f").write_bytes(b"wrong")

        monkeypatch.setattr(os, "rename", rename_and_spoil)
        done = case.restore(verify=True)
        assert (done.result.damaged, done.result.verified) == (1, 0)
        assert "digest mismatch when the restored file was read back" in done.problems[0].message

    def test_verify_counts_the_bytes_that_it_reads_back(self, case: RestoreCase) -> None:
        counts: list[int] = []

        class CountingProgress(Progress):
            def read_bytes_again(self, count: int) -> None:
                counts.append(count)

        case.progress = CountingProgress()
        chunks = [bytes([n]) * 700_000 for n in range(5)]
        case.store(*chunks)
        case.publish({b"large": of_chunks(*chunks)})
        assert case.restore(verify=True).result.verified == 1
        assert sum(counts) == 3_500_000
        assert max(counts) <= 1 << 20


class TestRestoreOfChangedFiles:
    def test_restore_writes_a_flagged_file_as_captured_and_reports_it(
        self, case: RestoreCase
    ) -> None:
        case.store(b"mixture")
        case.publish({b"log": flagged(file(b"", b"mixture"))})
        done = case.restore()
        assert case.found() == {"log": b"mixture"}
        assert (done.result.flagged, done.result.damaged) == (1, 0)
        assert done.reported(ProblemKind.CHANGED) == [b"log"]
        assert "rewritten" in done.problems[0].message


class TestRestoreThreads:
    """Another thread or process writes small entries; the result does not show which."""

    @pytest.fixture(autouse=True, params=["thread", "process"])
    def _small_batches(self, case: RestoreCase, request: pytest.FixtureRequest) -> None:
        entries = 1 if request.param == "process" else 1_000_000
        case.limits = PoolLimits(batch_jobs=3, process_entries=entries)

    def test_restore_reports_results_in_the_order_of_the_tree(
        self, case: RestoreCase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(restorer_module, "_MAX_POOLED_BYTES", 3000)
        plan: dict[bytes, Any] = {}
        expected = []
        plains = []
        bad = []
        for folder in range(12):
            inside: dict[bytes, Any] = {}
            for number in range(40):
                plain = noise(f"{folder} {number}", 2000 + 200 * (number % 7))
                plains.append(plain)
                node = file(b"", plain)
                path = b"%02d/%02d" % (folder, number)
                if number % 5 == 1:
                    node = flagged(node)
                    expected.append((ProblemKind.CHANGED, path))
                if number % 7 == 1:
                    bad.append(plain)
                    expected.append((ProblemKind.DAMAGED, path))
                inside[b"%02d" % number] = node
            plan[b"%02d" % folder] = inside
        case.store(*plains)
        case.publish(plan)
        for plain in bad:
            case.repo.damage(digest_of(plain))
        done = case.restore()
        assert [(problem.kind, problem.path) for problem in done.problems] == expected
        assert (done.result.files, done.result.damaged) == (480 - len(bad), len(bad))
        whole = {digest_of(plain) for plain in plains} - {digest_of(plain) for plain in bad}
        assert {digest_of(data) for data in case.found().values() if data is not None} == whole

    def test_restore_sets_the_times_of_a_directory_after_its_entries(
        self, case: RestoreCase
    ) -> None:
        below: Plan = {b"%03d" % number: {b"f": b"1", b"g": b"2"} for number in range(300)}
        case.publish({b"d": below, b"e": {b"h": b"3"}})
        assert case.restore().problems == []
        folders = [path for path in case.target.rglob("*") if path.is_dir()]
        assert len(folders) == 302
        assert {path.stat().st_mtime_ns for path in folders} == {MTIME_NS}

    def test_restore_holds_few_descriptors_open(
        self, case: RestoreCase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        most = 0
        make_directory = target_fs_module.make_directory

        def counting(fd: int, name: bytes) -> int:
            nonlocal most
            most = max(most, len(os.listdir("/proc/self/fd")))
            return make_directory(fd, name)

        monkeypatch.setattr(target_fs_module, "make_directory", counting)
        before = len(os.listdir("/proc/self/fd"))
        case.publish({b"%04d" % number: {b"f": b"%d" % number} for number in range(1500)})
        assert case.restore().result.files == 1500
        assert most < before + 200

    def test_restore_links_only_to_files_in_their_place(self, case: RestoreCase) -> None:
        linked = file(b"", b"x", inode=9, nlink=30, extra=NodeExtra(device=3))
        plan: dict[bytes, Any] = {}
        for number in range(30):
            plan[b"%02d a" % number] = b"%d" % number
            plan[b"%02d b" % number] = linked
        case.store(b"x")
        case.publish(plan)
        assert case.restore().problems == []
        names = [path for path in case.target.iterdir() if path.name.endswith("b")]
        assert {path.stat().st_nlink for path in names} == {30}


class TestTargetErrors:
    """What the file system of the target refuses ends a restore only where it must."""

    @staticmethod
    def failing(code: int) -> Callable[..., Any]:
        def fail(*arguments: object, **options: object) -> Any:
            raise OSError(code, os.strerror(code))

        return fail

    def test_restore_reports_an_entry_that_the_target_refuses_and_restores_the_rest(
        self, case: RestoreCase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case.publish({b"f": b"1", b"fifo": entry(b"", NodeType.FIFO), b"g": b"2"})
        monkeypatch.setattr(os, "mkfifo", self.failing(errno.EPERM))
        done = case.restore()
        assert (done.result.failed, done.result.files) == (1, 2)
        assert done.reported(ProblemKind.UNREADABLE) == [b"fifo"]
        assert case.found() == {"f": b"1", "g": b"2"}

    def test_restore_reports_a_refused_directory_once_and_skips_its_entries(
        self, case: RestoreCase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case.publish(TREE)
        monkeypatch.setattr(target_fs_module, "make_directory", self.failing(errno.EACCES))
        done = case.restore()
        assert done.reported(ProblemKind.UNREADABLE) == [b"d", b"empty"]
        assert case.found() == {"\udcff\n": b"1"}

    def test_restore_ends_on_a_full_disk_and_leaves_no_partial_file(
        self, case: RestoreCase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case.publish({b"d": {b"f": b"1"}, b"g": b"2"})
        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", self.failing(errno.ENOSPC))
            with pytest.raises(OSError, match="No space left") as reported:
                case.restore()
        assert reported.value.filename == os.fsencode(case.target / "d/f")
        assert case.found() == {"d": None}
        assert len(os.listdir("/proc/self/fd")) == before

    def test_restore_copies_a_file_that_cannot_be_linked(
        self, case: RestoreCase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case.store(b"x")
        linked = file(b"", b"x", inode=9, nlink=2, extra=NodeExtra(device=3))
        case.publish({b"a": linked, b"b": linked})
        monkeypatch.setattr(os, "link", self.failing(errno.EMLINK))
        (problem,) = case.restore().problems
        assert (problem.kind, problem.path) == (ProblemKind.METADATA, b"b")
        assert "it is a copy" in problem.message
        assert case.found() == {"a": b"x", "b": b"x"}


@pytest.fixture(autouse=True)
def few_descriptors_left_open() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before


def test_restore_only_reads_the_repository(case: RestoreCase) -> None:
    case.publish(TREE)
    before = {path: path.stat().st_mtime_ns for path in case.repo.root.rglob("*")}
    case.restore()
    after = {path: path.stat().st_mtime_ns for path in case.repo.root.rglob("*")}
    changed = {path for path in before.keys() | after if before.get(path) != after.get(path)}
    # That whole packs were verified is remembered with the index.
    assert all(path.is_relative_to(case.repo.root / "index") for path in changed)
