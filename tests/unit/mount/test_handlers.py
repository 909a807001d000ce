"""Requests as the kernel makes them, without a kernel: every answer is a reply or an errno."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pyfuse3
import pytest
import trio
from casfs_mount.attributes import CHANGING_TIMEOUT_S, IMMUTABLE_TIMEOUT_S
from casfs_mount.file_reader import FileReader
from casfs_mount.handlers import DisplayOptions, FileSystem
from casfs_mount.inodes import HARD_LINKS
from casfs_mount.repository_view import RepositoryView
from casfs_mount.view import SnapshotView

from casfs.errors import IndexUnusableError, StorageError
from casfs.format.tree import NodeExtra, NodeType, replace
from tests.support.builders import MTIME_NS, Plan, RepositoryFixture, entry, file
from tests.unit.mount.test_view import MountedView, sources_of

CTX = cast(pyfuse3.RequestContext, None)
TWICE = {"nlink": 2, "inode": 77, "extra": NodeExtra(device=5)}

TREE: Plan = {
    b"device": entry(
        b"", NodeType.CHARACTER_DEVICE, extra=NodeExtra(rdev=os.makedev(1, 3)), mode=0o4620
    ),
    b"file": b"twelve bytes",
    b"folder": {b"inside": b"!", b"twin": file(b"", b"same", **TWICE)},
    b"link": entry(b"", NodeType.SYMLINK, content=b"to/nowhere", size=10),
    b"twin": file(b"", b"same", **TWICE),
}


class Replies:
    """Catches what a listing replies; `room` is how many entries fit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[bytes] = []
        self.numbers: list[int] = []
        self.positions: list[int] = []
        self.room = 1000
        monkeypatch.setattr(pyfuse3, "readdir_reply", self.reply)

    def reply(
        self, token: object, name: bytes, attr: pyfuse3.EntryAttributes, position: int
    ) -> bool:
        if len(self.names) == self.room:
            return False
        self.names.append(name)
        self.numbers.append(attr.st_ino)
        self.positions.append(position)
        return True


TOKEN = cast(pyfuse3.ReaddirToken, None)


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> Replies:
    return Replies(monkeypatch)


@pytest.fixture
def repo(tmp_path: Path) -> RepositoryFixture:
    return RepositoryFixture(tmp_path)


@pytest.fixture
def mounted(repo: RepositoryFixture) -> Iterator[MountedView]:
    repo.store(b"same")
    mounted = MountedView(repo, TREE)
    yield mounted
    mounted.repository.close()


@pytest.fixture
async def system(mounted: MountedView) -> AsyncIterator[FileSystem]:
    mounted.context.guard.bind()
    yield FileSystem(mounted.view, DisplayOptions())


@contextmanager
def refused(code: int) -> Iterator[None]:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        yield
    assert caught.value.errno == code, os.strerror(caught.value.errno)


async def number_of(system: FileSystem, path: str) -> int:
    number = 1
    for name in path.encode().split(b"/"):
        number = (await system.lookup(number, name, CTX)).st_ino
        assert number
    return number


class TestAttributes:
    async def test_attributes_are_those_of_the_node(self, system: FileSystem) -> None:
        found = await system.lookup(1, b"file", CTX)
        assert stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o644
        assert (found.st_size, found.st_blocks, found.st_nlink) == (12, 1, 1)
        assert found.st_mtime_ns == found.st_ctime_ns == MTIME_NS
        assert found.entry_timeout == found.attr_timeout == IMMUTABLE_TIMEOUT_S
        same = await system.getattr(found.st_ino, CTX)
        assert (same.st_size, same.attr_timeout) == (12, IMMUTABLE_TIMEOUT_S)

    async def test_device_attributes_have_number_and_mode_bits(self, system: FileSystem) -> None:
        found = await system.lookup(1, b"device", CTX)
        assert stat.S_ISCHR(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o4620
        assert found.st_rdev == os.makedev(1, 3)

    async def test_the_owner_option_sets_the_owner_of_every_entry(
        self, mounted: MountedView
    ) -> None:
        system = FileSystem(mounted.view, DisplayOptions(owner=(12, 34)))
        for name in (b"file", b"folder", b"link", b".casfs"):
            found = await system.lookup(1, name, CTX)
            assert (found.st_uid, found.st_gid) == (12, 34)

    async def test_attributes_of_any_value_of_the_format_are_shown(
        self, repo: RepositoryFixture, replies: Replies
    ) -> None:
        plan: Plan = {
            b"owner": entry(b"", uid=(1 << 32) - 2, gid=(1 << 32) - 2, nlink=(1 << 32) - 1),
            b"past": entry(b"", mtime_ns=-(1 << 63), ctime_ns=(1 << 63) - 1),
            b"rdev": entry(b"", NodeType.BLOCK_DEVICE, extra=NodeExtra(rdev=(1 << 64) - 1)),
        }
        mounted = MountedView(repo, plan)
        with mounted.repository:
            await FileSystem(mounted.view, DisplayOptions()).readdir(1, 0, TOKEN)
        assert replies.names == [b".", b"..", b"owner", b"past", b"rdev"]

    async def test_a_missing_name_is_cached_as_missing(self, system: FileSystem) -> None:
        found = await system.lookup(1, b"missing", CTX)
        assert (found.st_ino, found.entry_timeout) == (0, IMMUTABLE_TIMEOUT_S)

    async def test_readlink_returns_the_target(self, system: FileSystem) -> None:
        assert await system.readlink(await number_of(system, "link"), CTX) == b"to/nowhere"

    async def test_lookup_of_dots_returns_the_directory_and_its_parent(
        self, system: FileSystem
    ) -> None:
        folder = await number_of(system, "folder")
        assert (await system.lookup(folder, b".", CTX)).st_ino == folder
        assert (await system.lookup(folder, b"..", CTX)).st_ino == 1
        assert (await system.lookup(1, b"..", CTX)).st_ino == 1


class TestHardLinks:
    async def test_hard_links_share_an_inode_number_that_leads_to_both(
        self, system: FileSystem
    ) -> None:
        number = await number_of(system, "twin")
        assert number == await number_of(system, "folder/twin") >= HARD_LINKS
        found = await system.getattr(number, CTX)
        assert (found.st_nlink, found.st_size, found.st_ino) == (2, 4, number)
        opened = await system.open(number, os.O_RDONLY, CTX)
        assert bytes(await system.read(opened.fh, 0, 10)) == b"same"

    async def test_a_hard_link_is_forgotten_when_the_kernel_forgets_it(
        self, system: FileSystem, replies: Replies
    ) -> None:
        number = await number_of(system, "twin")
        await system.readdir(1, 0, TOKEN)
        assert number in replies.numbers
        await system.forget([(number, 1), (3, 5)])
        assert (await system.getattr(number, CTX)).st_nlink == 2
        await system.forget([(number, 1)])
        with refused(errno.ESTALE):
            await system.getattr(number, CTX)

    async def test_a_hard_link_that_did_not_fit_into_a_reply_is_not_counted(
        self, system: FileSystem, replies: Replies
    ) -> None:
        replies.room = 6
        await system.readdir(1, 0, TOKEN)
        assert replies.names[-1] == b"link"
        assert len(system._links) == 0


class TestReaddir:
    async def test_readdir_begins_with_the_dots(self, system: FileSystem, replies: Replies) -> None:
        handle = await system.opendir(1, CTX)
        await system.readdir(handle, 0, TOKEN)
        assert replies.names == [b".", b"..", b"device", b"file", b"folder", b"link", b"twin"]
        assert len(set(replies.positions)) == 7 and 0 not in replies.positions
        await system.releasedir(handle)

    async def test_readdir_continues_from_every_position(
        self, system: FileSystem, replies: Replies
    ) -> None:
        await system.readdir(1, 0, TOKEN)
        whole, positions = replies.names[:], replies.positions[:]
        for i, position in enumerate(positions):
            replies.names.clear()
            await system.readdir(1, position, TOKEN)
            assert replies.names == whole[i + 1 :]

    async def test_readdir_with_replies_of_any_size_returns_every_name_once(
        self, repo: RepositoryFixture, replies: Replies
    ) -> None:
        names = [b"%05d" % n for n in range(9000)]
        mounted = MountedView(repo, dict.fromkeys(names, b""))
        with mounted.repository:
            mounted.context.guard.bind()
            system = FileSystem(mounted.view, DisplayOptions())
            for room in (1, 100, 5000):
                found: list[bytes] = []
                position = 0
                for _ in range(20_000 if room == 100 else 50):
                    replies.names.clear()
                    replies.room = room
                    await system.readdir(1, position, TOKEN)
                    if not replies.names:
                        break
                    found += replies.names
                    position = replies.positions[-1]
                assert found == [b".", b"..", *names][: len(found)]
                assert room == 1 or len(found) == 9002


class TestRead:
    async def test_read_returns_the_bytes_and_lets_the_kernel_cache_them(
        self, system: FileSystem
    ) -> None:
        opened = await system.open(await number_of(system, "file"), os.O_RDONLY, CTX)
        assert opened.keep_cache and not opened.direct_io
        assert bytes(await system.read(opened.fh, 0, 4096)) == b"twelve bytes"
        assert bytes(await system.read(opened.fh, 7, 3)) == b"byt"
        assert bytes(await system.read(opened.fh, 12, 3)) == b""
        await system.release(opened.fh)
        assert system._open == {}

    async def test_open_stores_a_small_file_in_the_kernels_page_cache_once(
        self, mounted: MountedView
    ) -> None:
        stored: list[tuple[int, int, bytes]] = []
        system = FileSystem(mounted.view, DisplayOptions(), lambda *parts: stored.append(parts))
        number = await number_of(system, "file")
        for _ in range(2):
            opened = await system.open(number, os.O_RDONLY, CTX)
            await system.release(opened.fh)
        assert stored == [(number, 0, b"twelve bytes")]

    async def test_open_stores_a_hard_link_under_the_number_that_its_names_share(
        self, mounted: MountedView
    ) -> None:
        stored: list[tuple[int, int, bytes]] = []
        system = FileSystem(mounted.view, DisplayOptions(), lambda *parts: stored.append(parts))
        number = await number_of(system, "folder/twin")
        opened = await system.open(number, os.O_RDONLY, CTX)
        assert number >= HARD_LINKS
        assert stored == [(number, 0, b"same")]
        await system.release(opened.fh)

    async def test_open_stores_no_report_and_nothing_without_the_kernel_cache(
        self, mounted: MountedView
    ) -> None:
        stored: list[tuple[int, int, bytes]] = []
        for display, path in (
            (DisplayOptions(), ".casfs/changed"),
            (DisplayOptions(kernel_cache=False), "file"),
        ):
            system = FileSystem(mounted.view, display, lambda *parts: stored.append(parts))
            await system.open(await number_of(system, path), os.O_RDONLY, CTX)
        assert stored == []

    async def test_open_without_the_kernel_cache_is_direct(self, mounted: MountedView) -> None:
        system = FileSystem(mounted.view, DisplayOptions(kernel_cache=False))
        opened = await system.open(await number_of(system, "file"), os.O_RDONLY, CTX)
        assert opened.direct_io and not opened.keep_cache

    async def test_open_of_a_report_is_direct(self, system: FileSystem) -> None:
        opened = await system.open(await number_of(system, ".casfs/changed"), os.O_RDONLY, CTX)
        assert opened.direct_io and not opened.keep_cache
        assert bytes(await system.read(opened.fh, 0, 100)) == b""

    async def test_read_across_chunks_returns_one_buffer_of_any_size(
        self, system: FileSystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = await system.open(await number_of(system, "file"), os.O_RDONLY, CTX)
        parts = [memoryview(b"a" * (1 << 20)), memoryview(b"b" * (1 << 20)), memoryview(b"c")]
        monkeypatch.setattr(FileReader, "read", lambda *_: parts)
        for _ in range(2):
            assert bytes(await system.read(opened.fh, 0, 4 << 20)) == b"".join(parts)

    @pytest.mark.parametrize(
        "flags",
        [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_RDONLY | os.O_APPEND],
    )
    async def test_open_for_writing_is_refused(self, system: FileSystem, flags: int) -> None:
        with refused(errno.EROFS):
            await system.open(await number_of(system, "file"), flags, CTX)

    async def test_a_read_from_a_slow_disk_does_not_delay_other_requests(
        self, system: FileSystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate = threading.Event()
        slow = await system.open(await number_of(system, "file"), os.O_RDONLY, CTX)
        fast = await system.open(await number_of(system, "folder/inside"), os.O_RDONLY, CTX)
        assert bytes(await system.read(fast.fh, 0, 1)) == b"!"
        whole = FileReader.read

        def read(reader: FileReader, offset: int, size: int) -> list[memoryview]:
            if reader._size == 12:
                system._view._context.guard.require_may_block()  # type: ignore[attr-defined]
                assert gate.wait(30)
            return whole(reader, offset, size)

        monkeypatch.setattr(FileReader, "read", read)
        found: list[bytes] = []

        async def read_slowly() -> None:
            found.append(bytes(await system.read(slow.fh, 0, 100)))

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_slowly)
                await trio.testing.wait_all_tasks_blocked()
                assert bytes(await system.read(fast.fh, 0, 1)) == b"!"
                assert found == []
                gate.set()
        assert found == [b"twelve bytes"]

    async def test_a_cancelled_read_does_not_block_the_server(
        self, system: FileSystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate = threading.Event()
        opened = await system.open(await number_of(system, "file"), os.O_RDONLY, CTX)

        def read(reader: FileReader, offset: int, size: int) -> list[memoryview]:
            system._view._context.guard.require_may_block()  # type: ignore[attr-defined]
            gate.wait(30)
            return []

        monkeypatch.setattr(FileReader, "read", read)
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(system.read, opened.fh, 0, 10)
                await trio.testing.wait_all_tasks_blocked()
                assert not system.is_idle()
                nursery.cancel_scope.cancel()
        gate.set()
        with trio.fail_after(30):
            while not system.is_idle():  # noqa: ASYNC110 (a thread does not announce its end)
                await trio.sleep(0.01)


class TestReadOnly:
    async def test_every_change_is_refused(self, system: FileSystem) -> None:
        anything = cast(Any, None)
        changes: list[Callable[..., Awaitable[object]]] = [
            system.setattr,
            system.mknod,
            system.mkdir,
            system.unlink,
            system.rmdir,
            system.symlink,
            system.rename,
            system.link,
            system.create,
            system.write,
            system.setxattr,
            system.removexattr,
        ]
        for change in changes:
            with refused(errno.EROFS):
                await change(1, anything, anything, anything)

    async def test_requests_that_a_read_only_mount_does_not_need_are_left_to_the_kernel(
        self, system: FileSystem
    ) -> None:
        for unused in (system.flush(1), system.fsync(1, False), system.access(1, 4, CTX)):
            with refused(errno.ENOSYS):
                await unused


class TestExtendedAttributes:
    async def test_extended_attributes_are_returned_or_reported_missing(
        self, repo: RepositoryFixture
    ) -> None:
        extra = NodeExtra(xattrs=((b"user.a", b"1"), (b"user.b", b"")))
        mounted = MountedView(repo, {b"f": file(b"", b"x", extra=extra)})
        with mounted.repository:
            system = FileSystem(mounted.view, DisplayOptions())
            number = await number_of(system, "f")
            assert await system.listxattr(number, CTX) == [b"user.a", b"user.b"]
            assert await system.getxattr(number, b"user.a", CTX) == b"1"
            assert await system.getxattr(number, b"user.b", CTX) == b""
            assert await system.getxattr(number, b"user.casfs.capture", CTX) == b"stable"
            with refused(errno.ENODATA):
                await system.getxattr(number, b"system.posix_acl_access", CTX)

    @pytest.mark.parametrize(("counted", "is_asked"), [(None, True), (1, True), (0, False)])
    async def test_the_kernel_is_asked_to_list_attributes_no_more_where_the_summary_counts_none(
        self, mounted: MountedView, counted: int | None, is_asked: bool
    ) -> None:
        system = FileSystem(counting_view(mounted, counted), DisplayOptions())
        number = await number_of(system, "file")
        assert system.enable_acl is is_asked
        if is_asked:
            assert await system.listxattr(number, CTX) == []
        else:
            with refused(errno.ENOSYS):
                await system.listxattr(number, CTX)
        assert await system.getxattr(number, b"user.casfs.capture", CTX) == b"stable"
        for name in (b"system.posix_acl_access", b"security.capability", b"user.casfs.unknown"):
            with refused(errno.ENODATA):
                await system.getxattr(number, name, CTX)

    async def test_attributes_of_the_root_itself_are_listed(self, mounted: MountedView) -> None:
        extra = NodeExtra(xattrs=((b"user.a", b"1"),))
        system = FileSystem(counting_view(mounted, 0, extra=extra), DisplayOptions())
        assert await system.listxattr(1, CTX) == [b"user.a"]

    async def test_a_mount_of_all_snapshots_lists_attributes_since_snapshots_appear(
        self, mounted: MountedView
    ) -> None:
        system = FileSystem(RepositoryView(mounted.context), DisplayOptions())
        assert system.enable_acl
        assert await system.listxattr(1, CTX) == []


def counting_view(mounted: MountedView, xattrs: int | None, **fields: Any) -> SnapshotView:
    """Return the view of the snapshot as if the summary of its root counted attributes like this."""
    root = mounted.snapshot.root
    assert root.tree is not None
    tree = msgspec.structs.replace(root.tree, xattrs=xattrs)
    counted = replace(root, tree=tree, **fields)
    return SnapshotView(mounted.context, mounted.snapshot_id, mounted.snapshot, counted, 1)


class TestErrors:
    @pytest.mark.expect_errors("casfs_mount")
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (StorageError("read", "packs/x", OSError(errno.EIO, "gone")), errno.EIO),
            (IndexUnusableError("the index is gone"), errno.EIO),
            (MemoryError(), errno.ENOMEM),
            (RecursionError("a bug"), errno.EIO),
            (OSError(errno.ENOENT, "somewhere else"), errno.EIO),
        ],
        ids=lambda value: type(value).__name__,
    )
    async def test_an_exception_of_any_kind_becomes_an_errno_in_every_handler(
        self,
        system: FileSystem,
        replies: Replies,
        monkeypatch: pytest.MonkeyPatch,
        error: Exception,
        code: int,
    ) -> None:
        opened = await system.open(await number_of(system, "file"), os.O_RDONLY, CTX)

        def fail(*args: object) -> Any:
            raise error

        for name in ("node", "lookup", "entries", "xattr", "xattr_names", "open", "statfs_totals"):
            monkeypatch.setattr(SnapshotView, name, fail)
        monkeypatch.setattr(FileReader, "read", fail)
        for request in (
            system.lookup(1, b"x", CTX),
            system.getattr(1, CTX),
            system.readlink(1, CTX),
            system.readdir(1, 0, TOKEN),
            system.open(2, os.O_RDONLY, CTX),
            system.read(opened.fh, 0, 10),
            system.getxattr(2, b"user.x", CTX),
            system.listxattr(2, CTX),
            system.statfs(CTX),
        ):
            with refused(code):
                await request
        assert replies.names == []

    async def test_an_unknown_inode_number_is_stale(self, system: FileSystem) -> None:
        for number in (9999, HARD_LINKS + 1):
            with refused(errno.ESTALE):
                await system.getattr(number, CTX)

    @pytest.mark.expect_errors("casfs_mount.damage_log")
    async def test_an_error_in_the_middle_of_a_listing_comes_after_the_entries_found(
        self, repo: RepositoryFixture, replies: Replies
    ) -> None:
        names = [b"%05d" % n for n in range(20_000)]
        plan: Plan = dict.fromkeys(names, b"")
        _, snapshot = repo.publish(plan)
        with repo.reading() as repository:
            assert snapshot.root.tree is not None
            parts = repository.trees.piece(snapshot.root.tree)
            first, ref = cast(Any, parts[len(parts) // 2])
        repo.damage(ref.digest)
        mounted = MountedView(repo, plan)
        with mounted.repository:
            mounted.context.guard.bind()
            system = FileSystem(mounted.view, DisplayOptions())
            replies.room = 1 << 30
            position = 0
            with refused(errno.EIO):
                for _ in range(100):
                    await system.readdir(1, position, TOKEN)
                    position = replies.positions[-1]
        assert replies.names == [b".", b"..", *names[: names.index(first)]]


class TestStatfs:
    async def test_statfs_reports_the_size_and_no_free_space(self, repo: RepositoryFixture) -> None:
        big = replace(file(b"", b"x"), size=10_000_000_001)
        mounted = MountedView(repo, {b"big": big, b"small": b"y"})
        with mounted.repository:
            found = await FileSystem(mounted.view, DisplayOptions()).statfs(CTX)
        assert found.f_blocks == -(-10_000_000_002 // found.f_frsize)
        assert (found.f_files, found.f_bfree, found.f_bavail, found.f_namemax) == (3, 0, 0, 255)


class TestRepositoryMount:
    async def test_the_lists_of_a_repository_mount_may_change_and_its_files_may_not(
        self, repo: RepositoryFixture, replies: Replies
    ) -> None:
        repo.store(b"content")
        repo.publish({b"f": b"content"})
        with repo.reading() as repository:
            context = sources_of(repository)
            context.guard.bind()
            system = FileSystem(RepositoryView(context), DisplayOptions())
            await system.readdir(1, 0, TOKEN)
            assert replies.names[:2] == [b".", b".."]
            assert replies.names[2:] == [b"hosts", b"ids", b"snapshots", b"tags", b"versions"]
            snapshots = await system.lookup(1, b"snapshots", CTX)
            assert snapshots.entry_timeout == snapshots.attr_timeout == CHANGING_TIMEOUT_S
            number = snapshots.st_ino
            with refused(errno.ENOENT):
                await system.lookup(number, b"yesterday", CTX)
            replies.names.clear()
            await system.readdir(number, 0, TOKEN)
            name, latest = replies.names[2:]
            assert latest == b"latest"
            link = (await system.lookup(number, latest, CTX)).st_ino
            assert await system.readlink(link, CTX) == name
            root = await system.lookup(number, name, CTX)
            assert root.entry_timeout == CHANGING_TIMEOUT_S
            root_number = root.st_ino
            inside = await system.lookup(root_number, b"f", CTX)
            assert inside.entry_timeout == inside.attr_timeout == IMMUTABLE_TIMEOUT_S
            assert (await system.getattr(root_number, CTX)).attr_timeout == IMMUTABLE_TIMEOUT_S
            opened = await system.open(
                (await system.lookup(root_number, b"f", CTX)).st_ino, os.O_RDONLY, CTX
            )
            assert bytes(await system.read(opened.fh, 0, 100)) == b"content"
            above = await system.lookup(root_number, b"..", CTX)
            assert above.st_ino == number
            assert (await system.statfs(CTX)).f_files == 2
