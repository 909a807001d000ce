"""What a snapshot looks like as a file system, before there is any FUSE."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from casfs_mount.background import BackgroundPool
from casfs_mount.blob_reader import BlobReader
from casfs_mount.chunk_cache import ChunkCache
from casfs_mount.damage_log import DamageLog
from casfs_mount.event_loop_guard import EventLoopGuard, WouldBlock
from casfs_mount.inodes import StaleError
from casfs_mount.report_files import manifest_line
from casfs_mount.tree_cache import TreeCache
from casfs_mount.view import (
    REPORT_NUMBERS,
    MountContext,
    RefusedError,
    SnapshotView,
    allocated_bytes,
)

from casfs.digest import Digest, SnapshotId, digest_of
from casfs.errors import BlobError
from casfs.format.tree import Node, NodeExtra, NodeType, replace
from casfs.repository.repository import Repository
from casfs.trees.content import EXTENT, HOLE, ContentWriter
from tests.support.builders import (
    Plan,
    RepositoryFixture,
    TreeFixture,
    entry,
    file,
    flagged,
    reference,
)

TREE: Plan = {
    b"folder": {
        b"deep": {b"changed\nhere": flagged(file(b"", b"mixture"))},
        b"plain": b"plain content",
    },
    b"link": entry(b"", NodeType.SYMLINK, content=b"folder/plain", size=12, nlink=1),
    b"tagged": file(
        b"",
        b"with attributes",
        extra=NodeExtra(xattrs=((b"security.capability", b"\1\2"), (b"user.own", b"mine"))),
    ),
}


def sources_of(repository: Repository, deny_changed: bool = False) -> MountContext:
    guard = EventLoopGuard()
    background = BackgroundPool()
    blobs = BlobReader(repository.store, guard)
    return MountContext(
        repository=repository,
        blobs=blobs,
        tree_cache=TreeCache(blobs.read),
        chunk_cache=ChunkCache(blobs.read, guard, background),
        guard=guard,
        background=background,
        deny_changed=deny_changed,
    )


class MountedView:
    """A snapshot built from a plan, and its view."""

    def __init__(self, repo: RepositoryFixture, plan: Plan, deny_changed: bool = False) -> None:
        self.snapshot_id, self.snapshot = repo.publish(plan)
        self.repository = repo.reading()
        self.context = sources_of(self.repository, deny_changed)
        root = self.snapshot.root
        self.view = SnapshotView(self.context, self.snapshot_id, self.snapshot, root, 1)

    def find(self, path: bytes) -> int:
        number = 1
        for name in path.split(b"/"):
            found = self.view.lookup(number, name)
            assert found is not None, path
            number = found[0]
        return number

    def text(self, path: bytes, step: int = 1 << 20) -> bytes:
        reader = self.view.open(self.find(path))
        parts: list[bytes] = []
        while part := b"".join(reader.read(sum(map(len, parts)), step)):
            parts.append(part)
        return b"".join(parts)


@pytest.fixture
def repo(tmp_path: Path) -> RepositoryFixture:
    return RepositoryFixture(tmp_path)


@pytest.fixture
def mounted(repo: RepositoryFixture) -> Iterator[MountedView]:
    repo.store(b"mixture", b"with attributes")
    mounted = MountedView(repo, TREE)
    yield mounted
    mounted.repository.close()


class TestSnapshotTree:
    def test_entries_are_found_by_name_and_by_listing(self, mounted: MountedView) -> None:
        names = [node.name for _, node, _ in mounted.view.entries(1, 0)]
        assert names == [b"folder", b"link", b"tagged"]
        for number, node, _ in mounted.view.entries(1, 0):
            assert mounted.view.lookup(1, node.name) == (number, node)
            assert mounted.view.node(number) == node
            assert mounted.view.parent(number) == 1
        assert mounted.view.lookup(1, b"missing") is None
        assert mounted.view.node(mounted.find(b"link")).content == b"folder/plain"
        assert mounted.view.parent(1) == 1

    def test_the_totals_of_a_snapshot_are_known_without_a_walk(self, mounted: MountedView) -> None:
        assert mounted.view.statfs_totals() == (7 + 13 + 15, 7)

    def test_an_inode_number_behind_the_snapshot_is_stale(self, mounted: MountedView) -> None:
        with pytest.raises(StaleError):
            mounted.view.node(7 + 1 + REPORT_NUMBERS)

    def test_only_regular_files_can_be_opened(self, mounted: MountedView) -> None:
        for path in (b"folder", b"link", b".casfs"):
            with pytest.raises(RefusedError):
                mounted.view.open(mounted.find(path))


class TestExtendedAttributes:
    def test_extended_attributes_of_a_file_are_listed_and_read(self, mounted: MountedView) -> None:
        number = mounted.find(b"tagged")
        assert mounted.view.xattr_names(number) == [b"security.capability", b"user.own"]
        assert mounted.view.xattr(number, b"user.own") == b"mine"
        assert mounted.view.xattr(number, b"security.capability") == b"\1\2"
        assert mounted.view.xattr(number, b"user.other") is None

    def test_casfs_attributes_are_read_by_name_and_never_listed(self, mounted: MountedView) -> None:
        number = mounted.find(b"folder/deep/changed\nhere")
        assert mounted.view.xattr_names(number) == []
        for name, value in (
            (b"capture", b"changed"),
            (b"captured", digest_of(b"mixture").hex().encode()),
            (b"observed", digest_of(b"seen when read again").hex().encode()),
            (b"reason", b"rewritten"),
            (b"attempts", b"3"),
            (b"snapshot", mounted.snapshot_id.hex().encode()),
            (b"nonsense", None),
        ):
            assert mounted.view.xattr(number, b"user.casfs." + name) == value, name

    def test_casfs_attributes_describe_a_stable_file(self, mounted: MountedView) -> None:
        number = mounted.find(b"folder/plain")
        digest = digest_of(b"plain content").hex().encode()
        for name, value in (
            (b"capture", b"stable"),
            (b"captured", digest),
            (b"observed", digest),
            (b"reason", b"none"),
            (b"attempts", b"1"),
        ):
            assert mounted.view.xattr(number, b"user.casfs." + name) == value, name

    def test_casfs_attributes_of_a_directory_name_only_its_snapshot(
        self, mounted: MountedView
    ) -> None:
        number = mounted.find(b"folder")
        assert mounted.view.xattr(number, b"user.casfs.capture") is None
        assert mounted.view.xattr(number, b"user.casfs.snapshot") is not None

    def test_a_files_own_attribute_hides_a_casfs_attribute_of_that_name(
        self, repo: RepositoryFixture
    ) -> None:
        own = NodeExtra(xattrs=((b"user.casfs.capture", b"mine"),))
        mounted = MountedView(repo, {b"f": file(b"", b"x", extra=own)})
        with mounted.repository:
            assert mounted.view.xattr(mounted.find(b"f"), b"user.casfs.capture") == b"mine"


class TestOpeningChangedFile:
    def test_opening_a_changed_file_is_logged_once(
        self, mounted: MountedView, caplog: pytest.LogCaptureFixture
    ) -> None:
        number = mounted.find(b"folder/deep/changed\nhere")
        with caplog.at_level(logging.WARNING, "casfs_mount"):
            for _ in range(3):
                assert b"".join(mounted.view.open(number).read(0, 100)) == b"mixture"
        (record,) = caplog.records
        assert "folder/deep/changed\\nhere" in record.getMessage()

    def test_opening_a_changed_file_can_be_denied(
        self, repo: RepositoryFixture, caplog: pytest.LogCaptureFixture
    ) -> None:
        mounted = MountedView(repo, TREE, deny_changed=True)
        number = mounted.find(b"folder/deep/changed\nhere")
        with mounted.repository:
            for _ in range(2):
                with pytest.raises(RefusedError) as caught:
                    mounted.view.open(number)
                assert caught.value.errno == errno.EIO
            mounted.view.open(mounted.find(b"folder/plain"))
        assert "denied" in caplog.text


class TestReportFolder:
    def test_the_report_folder_is_found_but_not_listed(self, mounted: MountedView) -> None:
        number = mounted.find(b".casfs")
        assert mounted.view.node(number).kind == NodeType.DIRECTORY
        assert [node.name for _, node, _ in mounted.view.entries(1, 0)].count(b".casfs") == 0
        names = [node.name for _, node, _ in mounted.view.entries(number, 0)]
        assert names == [b"changed", b"damage", b"manifest.b3", b"snapshot.json"]
        assert mounted.view.parent(number) == 1
        assert mounted.view.parent(mounted.find(b".casfs/changed")) == number
        assert mounted.view.lookup(number, b"other") is None

    def test_the_report_folder_is_only_at_the_root(self, mounted: MountedView) -> None:
        assert mounted.view.lookup(mounted.find(b"folder"), b".casfs") is None

    def test_the_report_folder_gives_way_to_a_real_entry_of_its_name(
        self, repo: RepositoryFixture
    ) -> None:
        mounted = MountedView(repo, {b".casfs": {b"real": b""}})
        with mounted.repository:
            number = mounted.find(b".casfs")
            assert [node.name for _, node, _ in mounted.view.entries(number, 0)] == [b"real"]

    def test_a_listing_of_the_report_folder_continues_from_a_position(
        self, mounted: MountedView
    ) -> None:
        number = mounted.find(b".casfs")
        whole = list(mounted.view.entries(number, 0))
        assert list(mounted.view.entries(number, whole[1][2])) == whole[2:]

    def test_the_changed_report_has_one_line_for_each_changed_file(
        self, mounted: MountedView
    ) -> None:
        assert mounted.text(b".casfs/changed") == b"folder/deep/changed\\nhere\n"

    def test_the_changed_report_reads_nothing_where_no_file_changed(
        self, repo: RepositoryFixture
    ) -> None:
        mounted = MountedView(repo, {b"a": {b"b": b""}})
        with mounted.repository:
            number = mounted.find(b".casfs/changed")
            mounted.context.tree_cache.get = None  # type: ignore[assignment,method-assign]
            mounted.repository.trees._read = None  # type: ignore[assignment]
            assert b"".join(mounted.view.open(number).read(0, 10)) == b""

    def test_the_snapshot_report_is_json_of_the_reported_size(self, mounted: MountedView) -> None:
        text = mounted.text(b".casfs/snapshot.json")
        assert mounted.view.node(mounted.find(b".casfs/snapshot.json")).size == len(text)
        reported = json.loads(text)
        assert reported["id"] == mounted.snapshot_id.hex()
        assert (reported["host"], reported["entries"], reported["flagged"]) == ("here", 6, 1)

    def test_the_snapshot_report_says_whether_the_snapshot_is_unproven(
        self, mounted: MountedView, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert json.loads(mounted.text(b".casfs/snapshot.json"))["unproven"] is False
        monkeypatch.setattr(
            mounted.repository.snapshots.provenance,
            "is_from_trusted_writer",
            lambda snapshot_id: False,
        )
        root = mounted.snapshot.root
        mounted.view = SnapshotView(mounted.context, mounted.snapshot_id, mounted.snapshot, root, 1)
        assert json.loads(mounted.text(b".casfs/snapshot.json"))["unproven"] is True

    def test_the_manifest_lists_every_regular_file(self, mounted: MountedView) -> None:
        expected = [
            (b"folder/deep/changed\\nhere", b"mixture", b"\\"),
            (b"folder/plain", b"plain content", b""),
            (b"tagged", b"with attributes", b""),
        ]
        assert mounted.text(b".casfs/manifest.b3") == b"".join(
            b"%s%s  %s\n" % (mark, digest_of(content).hex().encode(), path)
            for path, content, mark in expected
        )

    def test_the_manifest_reads_the_same_in_pieces_of_any_size_and_from_the_beginning(
        self, repo: RepositoryFixture
    ) -> None:
        mounted = MountedView(repo, {b"%05d" % n: b"x%d" % n for n in range(6000)})
        with mounted.repository:
            whole = mounted.text(b".casfs/manifest.b3", 1 << 24)
            assert whole.count(b"\n") == 6000
            assert mounted.text(b".casfs/manifest.b3", 4096) == whole
            reader = mounted.view.open(mounted.find(b".casfs/manifest.b3"))
            rng = random.Random(4)
            for _ in range(30):
                offset, size = rng.randrange(len(whole) + 100), rng.randrange(1, 70_000)
                assert b"".join(reader.read(offset, size)) == whole[offset : offset + size]

    def test_the_manifest_ends_with_an_error_at_a_damaged_directory(
        self, repo: RepositoryFixture
    ) -> None:
        plan: Plan = {b"a": b"first", b"b": {b"c": b""}, b"z": b"last"}
        repo.publish(plan)
        repo.damage(reference(TreeFixture().build({b"c": b""})))
        mounted = MountedView(repo, plan)
        with mounted.repository:
            reader = mounted.view.open(mounted.find(b".casfs/manifest.b3"))
            assert b"".join(reader.read(0, 1000)) == manifest_line(b"a", digest_of(b"first"))
            for _ in range(3):
                with pytest.raises(BlobError):
                    reader.read(len(manifest_line(b"a", digest_of(b"first"))), 1000)

    @pytest.mark.expect_errors("casfs_mount.damage_log")
    def test_the_damage_report_lists_the_damage_that_reads_met(
        self, repo: RepositoryFixture
    ) -> None:
        digest = digest_of(b"plain content")
        repo.store(b"plain content")
        repo.damage(digest)
        mounted = MountedView(repo, TREE)
        with mounted.repository:
            assert mounted.text(b".casfs/damage") == b""
            reader = mounted.view.open(mounted.find(b"folder/plain"))
            for _ in range(3):
                with pytest.raises(Exception, match="digest"):
                    reader.read(0, 10)
            (line,) = mounted.text(b".casfs/damage").decode().splitlines()
        assert line.startswith("folder/plain: bytes 0 to 12: blob " + digest.hex())
        assert " in pack " in line

    def test_only_the_report_folder_may_change(self, mounted: MountedView) -> None:
        assert mounted.view.is_immutable(1)
        assert mounted.view.is_immutable(mounted.find(b"folder/plain"))
        assert not mounted.view.is_immutable(mounted.find(b".casfs"))
        assert not mounted.view.is_immutable(mounted.find(b".casfs/damage"))


class TestEventLoopThread:
    def test_the_event_loop_reads_cached_small_trees_at_once(self, mounted: MountedView) -> None:
        mounted.find(b"folder/plain")  # opens the pack, which only a thread that may wait does
        guard = mounted.context.guard
        fresh = sources_of(mounted.repository)
        view = SnapshotView(fresh, mounted.snapshot_id, mounted.snapshot, mounted.snapshot.root, 1)
        fresh.guard.bind()
        assert guard.may_block()
        assert next(node.name for _, node, _ in view.entries(1, 0)) == b"folder"

    def test_the_event_loop_does_not_wait_for_a_pack_that_is_not_open(
        self, repo: RepositoryFixture
    ) -> None:
        mounted = MountedView(repo, TREE)
        with mounted.repository:
            mounted.context.guard.bind()
            with pytest.raises(WouldBlock):
                list(mounted.view.entries(1, 0))


def test_the_damage_log_reports_each_range_once_and_is_bounded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage = DamageLog()
    error = BlobError(Digest(bytes(32)), "it is missing: no pack holds it")
    logging.getLogger("casfs_mount.damage_log").disabled = True
    try:
        for n in range(20_000):
            damage.add_range(b"file %d\n" % (n // 2), n, 10, error)
    finally:
        logging.getLogger("casfs_mount.damage_log").disabled = False
    lines = damage.text().splitlines()
    assert len(lines) == 10_000
    assert lines[0].startswith(b"file 0\\n: bytes 0 to 9: blob 0000")


def test_names_that_are_not_text_do_not_break_the_manifest() -> None:
    digest = Digest(bytes(32))
    hexadecimal = b"00" * 32
    assert manifest_line(b"plain", digest) == hexadecimal + b"  plain\n"
    assert manifest_line(b"back\\slash", digest) == b"\\" + hexadecimal + b"  back\\\\slash\n"
    assert manifest_line(b"new\nline", digest) == b"\\" + hexadecimal + b"  new\\nline\n"
    assert manifest_line(b"in\rside", digest) == hexadecimal + b"  in\rside\n"
    assert manifest_line(b"end\r", digest) == b"\\" + hexadecimal + b"  end\\r\n"
    assert manifest_line(b"\xff", digest) == hexadecimal + b"  \xef\xbf\xbd\n"


def test_holes_take_no_room() -> None:
    def node(*records: tuple[int, bytes]) -> Node:
        content = b"".join(EXTENT.pack(length, digest) for length, digest in records)
        return entry(b"f", size=sum(length for length, _ in records), content=content)

    data = digest_of(b"x")
    assert allocated_bytes(node()) == 0
    assert allocated_bytes(node((10, data))) == 10
    assert allocated_bytes(node((10, HOLE))) == 0
    assert allocated_bytes(node((10, data), (1 << 40, HOLE), (5, data))) == 15
    writer = ContentWriter(lambda *_: None, digest_of)
    for n in range(300):
        writer.add(1 + n, data)
    content, levels = writer.finish()
    deep = replace(node(), content=content, levels=levels, size=77)
    assert (levels, allocated_bytes(deep)) == (1, 77)


def test_a_view_of_a_directory_has_that_as_its_root(repo: RepositoryFixture) -> None:
    snapshot_id, snapshot = repo.publish(TREE)
    with repo.reading() as repository:
        _, _, _, node = repository.snapshots.resolve_path(f"{snapshot_id.hex()}:folder")
        view = SnapshotView(sources_of(repository), SnapshotId(snapshot_id), snapshot, node, 1)
        assert [found.name for _, found, _ in view.entries(1, 0)] == [b"deep", b"plain"]
        folder = view.lookup(1, b".casfs")
        assert folder is not None
        found = view.lookup(folder[0], b"changed")
        assert found is not None
        assert b"".join(view.open(found[0]).read(0, 100)) == b"deep/changed\\nhere\n"


def test_only_the_owner_of_the_mount_can_read_what_names_all_files(repo: RepositoryFixture) -> None:
    """The reports name files in directories that another user of the mount may not enter."""
    mounted = MountedView(repo, {b"private": {b"diary": b"x"}})
    for path, mode in (
        (b".casfs", 0o500),
        (b".casfs/manifest.b3", 0o400),
        (b".casfs/changed", 0o400),
    ):
        node = mounted.view.node(mounted.find(path))
        assert (node.mode, node.uid, node.gid) == (mode, os.getuid(), os.getgid())
