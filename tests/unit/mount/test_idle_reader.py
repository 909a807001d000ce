"""Files decoded between two requests: those that a walk opens next, a few ahead, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from casfs_mount.event_loop_guard import WouldBlock
from casfs_mount.file_reader import MAX_SMALL_BYTES
from casfs_mount.idle_reader import MAX_AHEAD, NEAR_FILES, NEVER, IdleReader, WalkAhead

from casfs.digest import digest_of
from casfs.errors import TreeError
from casfs.format.tree import NodeType
from tests.support.builders import Plan, RepositoryFixture, entry
from tests.unit.mount.test_view import MountedView


class Files:
    """The files with the numbers below `end`; notes what is decoded, and fails at one number."""

    def __init__(self, end: int = 1000, fails_at: int = -1, error: Exception | None = None) -> None:
        self.decoded: list[int] = []
        self.begun: list[int] = []
        self.end = end
        self.fails_at = fails_at
        self.error = error

    def after(self, number: int) -> Iterator[int]:
        self.begun.append(number)
        for beside in range(number + 1, self.end):
            if beside == self.fails_at and self.error is not None:
                raise self.error
            self.decoded.append(beside)
            yield beside


def work_off(reader: IdleReader | WalkAhead) -> None:
    while reader.work():
        pass


def test_a_walk_finds_each_file_decoded_and_few_are_decoded_ahead() -> None:
    files = Files()
    reader = WalkAhead(files.after, NEAR_FILES)
    for number in range(10, 100):
        if number > 11:
            assert number in files.decoded
        reader.follow(number)
        work_off(reader)
        assert max(files.decoded, default=0) <= number + MAX_AHEAD
    assert files.begun == [11]
    assert files.decoded == list(range(12, 99 + MAX_AHEAD + 1))


def test_a_file_that_a_walk_passes_over_does_not_stop_it() -> None:
    files = Files()
    reader = WalkAhead(files.after, NEAR_FILES)
    for number in range(10, 60, 3):
        reader.follow(number)
        work_off(reader)
    assert files.begun == [13]


@pytest.mark.parametrize("opened", [[5], [5, 500_000, 7], [9, 8, 7, 6], [5, 5, 5]])
def test_opens_that_are_no_walk_decode_nothing(opened: list[int]) -> None:
    files = Files()
    reader = WalkAhead(files.after, NEAR_FILES)
    for number in opened:
        reader.follow(number)
        assert not reader.is_due() and not reader.work()
    assert files.begun == []


@pytest.mark.parametrize("error", [WouldBlock(), TreeError("a tree is damaged")])
def test_work_ends_where_a_file_would_wait_or_is_damaged_and_begins_again_behind_it(
    error: Exception,
) -> None:
    files = Files(fails_at=13, error=error)
    reader = WalkAhead(files.after, NEAR_FILES)
    reader.follow(10)
    reader.follow(11)
    work_off(reader)
    assert files.decoded == [12] and not reader.is_due()
    reader.follow(12)
    assert not reader.is_due()
    reader.follow(13)
    work_off(reader)
    assert files.decoded[-1] == 13 + MAX_AHEAD


@pytest.mark.expect_errors("casfs_mount.idle_reader")
def test_an_unexpected_error_is_logged_and_ends_the_work(caplog: pytest.LogCaptureFixture) -> None:
    reader = WalkAhead(Files(fails_at=12, error=ZeroDivisionError()).after)
    reader.follow(10)
    reader.follow(11)
    assert not reader.work() and not reader.is_due()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_entries_without_small_files_count_as_steps_and_not_as_files() -> None:
    reader = WalkAhead(lambda number: iter([NEVER] * 50))
    reader.follow(1)
    reader.follow(2)
    assert sum(1 for _ in iter(reader.work, False)) == 50
    assert not reader.is_due()


def test_a_view_decodes_the_small_files_of_one_directory_in_order(tmp_path: Path) -> None:
    repo = RepositoryFixture(tmp_path)
    big = bytes(range(256)) * (MAX_SMALL_BYTES // 256) + b"!"
    mounted = MountedView(
        repo,
        {
            b"folder": {
                b"a": b"first",
                b"b": b"second",
                b"c": big,
                b"d": entry(b"", NodeType.SYMLINK, content=b"a", size=1),
                b"e": {b"below": b"of another folder"},
                b"f": b"third",
            },
            b"next": b"outside",
        },
    )
    with mounted.repository:
        found = mounted.view.lookup(1, b"folder")
        assert found is not None
        numbers = {node.name: below for below, node, _ in mounted.view.entries(found[0], 0)}
        chunks = mounted.context.chunk_cache
        steps = mounted.view.decode_files_after(numbers[b"a"])
        assert next(steps) == numbers[b"b"]
        assert chunks.holds(digest_of(b"second")) and not chunks.holds(digest_of(b"third"))
        assert list(steps) == [NEVER, NEVER, NEVER, numbers[b"f"]]
        assert chunks.holds(digest_of(b"third"))
        for content in (big, b"of another folder", b"outside"):
            assert not chunks.holds(digest_of(content))
        assert chunks.cached_bytes == 0, "what is read once takes no room in the cache"


def test_few_files_that_are_decoded_ahead_and_not_read_stay_in_memory(tmp_path: Path) -> None:
    contents = [b"file %d" % number for number in range(100)]
    mounted = MountedView(RepositoryFixture(tmp_path), {content: content for content in contents})
    with mounted.repository:
        chunks = mounted.context.chunk_cache
        assert len(list(mounted.view.decode_files_after(2))) == 99
        held = [content for content in contents if chunks.holds(digest_of(content))]
        assert 0 < len(held) < 20 and chunks.cached_bytes == 0


def test_a_walk_through_directories_may_pass_over_any_number_of_entries() -> None:
    directories = Files()
    reader = WalkAhead(directories.after)
    reader.follow(1)
    reader.follow(1 + 2 * NEAR_FILES)
    work_off(reader)
    assert directories.decoded == list(range(2 + 2 * NEAR_FILES, 2 + 2 * NEAR_FILES + MAX_AHEAD))


def test_an_idle_reader_decodes_ahead_of_files_and_of_directories() -> None:
    files, directories = Files(), Files()
    reader = IdleReader(files.after, directories.after)
    for number in (10, 11):
        reader.on_open(number)
        reader.on_readdir(number)
    assert reader.is_due()
    work_off(reader)
    assert files.decoded == directories.decoded == list(range(12, 12 + MAX_AHEAD))
    assert not reader.is_due()


def test_a_view_decodes_the_trees_of_a_walk_in_its_order_and_one_at_a_time(tmp_path: Path) -> None:
    repo = RepositoryFixture(tmp_path)
    plan: Plan = {
        b"a": {b"below": {b"deep": b"1"}, b"file": b"2"},
        b"b": {b"other": b"3"},
        b"c": b"4",
        b"d": {},
    }
    mounted = MountedView(repo, plan)
    with mounted.repository:
        view, trees = mounted.view, mounted.context.tree_cache
        top = {node.name: (number, node) for number, node, _ in view.entries(1, 0)}
        steps = view.decode_directories_after(1)
        assert next(steps) == top[b"a"][0]
        first, second = top[b"a"][1].tree, top[b"b"][1].tree
        assert first is not None and trees.holds(first)
        assert second is not None and not trees.holds(second)
        names = [view.node(number).name for number in steps]
        assert names == [b"below", b"b", b"d"]
        assert trees.holds(second)
        assert list(view.decode_directories_after(top[b"d"][0])) == []
        folder = view.lookup(1, b".casfs")
        assert folder is not None and list(view.decode_directories_after(folder[0])) == []
