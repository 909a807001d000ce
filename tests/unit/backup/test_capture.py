"""Captures of single files: what a node says, and how long is waited for one that changes."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from casfs.backup import source_reader as source_reader_module
from casfs.backup import stability
from casfs.backup.capture import Capturer
from casfs.backup.reflink import Freeze, Reflinker
from casfs.backup.source_fs import Handle
from casfs.backup.source_reader import ReadResult, SourceReader
from casfs.backup.stability import RetryBudget
from casfs.digest import Digest, digest_of
from casfs.errors import NotRegularError
from casfs.format.chunker import Chunker
from casfs.format.codec import BlobKind
from casfs.format.config import new_config
from casfs.format.tree import CaptureState, Node, capture_of, captured_digest
from tests.support.stores import noise

YEAR_2020_NS = 1_577_836_800_000_000_007


class Scene:
    """A folder, and a capturer whose blobs and pauses are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs: dict[bytes, bytes] = {}
        self.pauses: list[float] = []
        self.fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def capturer(
        self,
        attempts: int = 3,
        patience_s: float = 60.0,
        read: Callable[[SourceReader], SourceReader] = lambda reader: reader,
    ) -> Capturer:
        chunker = Chunker(new_config("2020-01-01T00:00:00Z").chunker)
        reader = read(SourceReader(chunker, self._put, digest_of))
        return Capturer(
            reader, Reflinker(Freeze.NEVER), RetryBudget(patience_s), attempts, self.pauses.append
        )

    def capture(self, name: str) -> Node:
        return self.capturer().capture(self.fd, name.encode())

    def _put(self, kind: BlobKind, digest: Digest, plain: bytes) -> None:
        self.blobs[digest] = plain


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    found = Scene(tmp_path)
    yield found
    os.close(found.fd)


def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the clock an hour ahead, so that every file is old enough to be trusted."""
    ahead = time.time_ns() + 3600 * 1_000_000_000
    monkeypatch.setattr("casfs.backup.capture.time.time_ns", lambda: ahead)


class TestCapturedNode:
    def test_a_captured_node_records_content_size_and_metadata(
        self, scene: Scene, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old(monkeypatch)
        file = scene.folder / "file"
        file.write_bytes(b"content")
        file.chmod(0o4751)
        os.utime(file, ns=(1, YEAR_2020_NS))
        st = file.stat()
        node = scene.capture("file")
        assert (node.name, node.size, node.mode) == (b"file", 7, 0o4751)
        assert (node.mtime_ns, node.ctime_ns, node.inode) == (
            YEAR_2020_NS,
            st.st_ctime_ns,
            st.st_ino,
        )
        assert (node.state, node.racy, node.extra) == (CaptureState.STABLE, False, None)
        assert captured_digest(node) == blake3(b"content").digest()
        assert scene.blobs == {digest_of(b"content"): b"content"}

    def test_an_empty_file_stores_nothing(self, scene: Scene) -> None:
        (scene.folder / "empty").touch()
        node = scene.capture("empty")
        assert (node.size, node.content, node.state) == (0, b"", CaptureState.STABLE)
        assert scene.blobs == {}

    def test_a_captured_node_has_the_xattrs(self, scene: Scene) -> None:
        file = scene.folder / "file"
        file.write_bytes(b"content")
        try:
            os.setxattr(file, b"user.colour", b"red")
        except OSError:
            pytest.skip("the file system of the tests has no xattrs")
        node = scene.capture("file")
        assert node.extra is not None
        assert (b"user.colour", b"red") in node.extra.xattrs

    def test_a_file_as_young_as_its_capture_is_racy(self, scene: Scene) -> None:
        file = scene.folder / "file"
        for _ in range(20):
            file.write_bytes(b"young")
            node = scene.capture("file")
            assert node.state == CaptureState.STABLE
            if node.racy:
                return
        pytest.fail("no capture came within a tick of the writing")

    @pytest.mark.parametrize(
        ("age_ns", "is_whole", "is_racy"),
        [
            (1_000_000, False, True),
            (19_000_000, False, True),
            (21_000_000, False, False),
            (-5_000_000_000, False, True),
            (1_500_000_000, True, True),
            (3_000_000_000, True, False),
        ],
    )
    def test_a_file_is_racy_within_the_granularity_of_the_clock(
        self, age_ns: int, is_whole: bool, is_racy: bool
    ) -> None:
        began_ns = 1_700_000_000_000_000_000 + (age_ns if is_whole else 123)
        stamp_ns = began_ns - age_ns
        times = (0.0, stamp_ns / 1e9, stamp_ns / 1e9, 0, stamp_ns, stamp_ns)
        st = os.stat_result((0o100644, 1, 1, 1, 0, 0, 0, 0, 0, 0, *times))
        assert (st.st_mtime_ns % 1_000_000_000 == 0) == is_whole
        assert stability.is_racy(st, began_ns) is is_racy


class TestLargeFile:
    """Its digest is computed by another thread, of the buffers that are stored."""

    @pytest.mark.parametrize("large_bytes", [0, 3 << 20, 1 << 40])
    @pytest.mark.parametrize("holes", [False, True])
    def test_a_large_file_has_the_digest_of_all_its_bytes_in_order(
        self, scene: Scene, monkeypatch: pytest.MonkeyPatch, large_bytes: int, holes: bool
    ) -> None:
        monkeypatch.setattr(source_reader_module, "_LARGE_BYTES", large_bytes)
        file = scene.folder / "file"
        size = 12 << 20
        with file.open("wb") as stream:
            for number in range(3):
                stream.write(noise(f"part {number}", 2 << 20))
                if holes:
                    stream.seek(2 << 20, os.SEEK_CUR)
            stream.truncate(size)
        before = threading.active_count()
        node = scene.capture("file")
        assert node.size == size
        assert captured_digest(node) == blake3(file.read_bytes()).digest()
        assert threading.active_count() <= before, "no thread outlives the capture"

    def test_a_large_file_that_fails_to_read_leaves_no_thread(
        self, scene: Scene, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(source_reader_module, "_LARGE_BYTES", 0)
        (scene.folder / "file").write_bytes(noise("file", 12 << 20))
        preadv, left = os.preadv, iter(range(6))

        def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
            if next(left, None) is None:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return preadv(fd, [buffers[0][: 1 << 20]], offset)

        before = threading.active_count()
        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(OSError, match="Input/output error"):
            scene.capture("file")
        assert threading.active_count() <= before


class TestOtherFileTypes:
    @pytest.mark.parametrize("kind", ["directory", "fifo", "symlink", "dangling", "socket"])
    def test_entries_that_are_no_regular_files_are_neither_opened_nor_followed(
        self, scene: Scene, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(scene.folder)
        name = Path("name")
        match kind:
            case "directory":
                name.mkdir()
            case "fifo":
                os.mkfifo(name)
            case "symlink":
                Path("target").write_bytes(b"never read")
                name.symlink_to("target")
            case "dangling":
                name.symlink_to("nowhere")
            case "socket":
                with socket.socket(socket.AF_UNIX) as server:
                    server.bind(str(name))
        with pytest.raises(NotRegularError):
            scene.capture("name")
        assert scene.blobs == {}

    def test_a_missing_name_raises_file_not_found(self, scene: Scene) -> None:
        with pytest.raises(FileNotFoundError):
            scene.capture("gone")


class Restless(SourceReader):
    """A reader that finds the file longer after each reading than it was, and other at its start."""

    file: Path

    def read(self, fd: Handle, st: os.stat_result) -> ReadResult:
        found = super().read(fd, st)
        with self.file.open("r+b") as opened:
            opened.write(os.urandom(8))
        return found


class TestRetryBudget:
    def restless(
        self, scene: Scene, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., SourceReader]:
        old(monkeypatch)
        file = scene.folder / "file"
        file.write_bytes(bytes(100))

        def make(reader: SourceReader) -> SourceReader:
            reader.__class__ = Restless
            assert isinstance(reader, Restless)
            reader.file = file
            return reader

        return make

    def test_a_capture_pauses_longer_before_each_further_attempt(
        self, scene: Scene, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = self.restless(scene, monkeypatch)
        node = scene.capturer(attempts=6, read=read).capture(scene.fd, b"file")
        assert scene.pauses == [0.05, 0.1, 0.2, 0.4, 0.8]
        evidence = capture_of(node)
        assert (node.state, evidence and evidence.attempts) == (CaptureState.CHANGED, 6)

    def test_a_capture_does_not_pause_for_a_stable_file(self, scene: Scene) -> None:
        (scene.folder / "file").write_bytes(b"still")
        scene.capture("file")
        assert scene.pauses == []

    def test_a_capture_stops_before_a_pause_that_its_budget_does_not_cover(
        self, scene: Scene, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = self.restless(scene, monkeypatch)
        capturer = scene.capturer(attempts=100, patience_s=1.0, read=read)
        node = capturer.capture(scene.fd, b"file")
        assert scene.pauses == [0.05, 0.1, 0.2], "0.4 s more would touch the half kept back"
        evidence = capture_of(node)
        assert evidence is not None and evidence.attempts == 4

    def test_all_files_share_one_retry_budget(
        self, scene: Scene, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = self.restless(scene, monkeypatch)
        capturer = scene.capturer(attempts=3, patience_s=0.5, read=read)
        made = []
        for _ in range(3):
            evidence = capture_of(capturer.capture(scene.fd, b"file"))
            assert evidence is not None
            made.append(evidence.attempts)
        assert made == [3, 2, 1]

    def test_a_retry_budget_reserves_half_of_the_time_for_the_final_retry(self) -> None:
        budget = RetryBudget(10.0)
        assert budget.can_spend(4.9)
        assert not budget.can_spend(5.0)
        budget.spend(4.0)
        assert budget.can_spend(0.9)
        assert not budget.can_spend(1.1)
        budget.release_reserve()
        assert budget.can_spend(5.9)
        assert not budget.can_spend(6.1)

    def test_an_empty_retry_budget_allows_nothing(self) -> None:
        budget = RetryBudget(0.0)
        assert not budget.can_spend(0.0)
        budget.release_reserve()
        assert not budget.can_spend(0.0)

    def test_a_retry_budget_estimates_a_read_from_earlier_reads(self) -> None:
        budget = RetryBudget()
        assert budget.estimate(1 << 40) == 0.0
        budget.record(100, 2.0)
        budget.record(300, 2.0)
        assert budget.estimate(1000) == 10.0

    def test_a_final_retry_skips_a_file_that_is_too_large_for_the_budget(
        self, scene: Scene, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = self.restless(scene, monkeypatch)
        budget = RetryBudget(10.0)
        budget.release_reserve()
        capturer = scene.capturer(attempts=1, read=read)
        node = capturer.capture(scene.fd, b"file")
        capturer._budget = budget
        again = capturer.capture_again(scene.fd, node)
        assert again is not None
        evidence = capture_of(again)
        assert evidence is not None and evidence.attempts == 2
        budget.record(1, 1.0)
        assert capturer.capture_again(scene.fd, node) is None
