"""Small files are stored in the kernel's page cache once, on opening, and never while open."""

from __future__ import annotations

import errno
import os

import pytest
from casfs_mount.file_reader import MAX_SMALL_BYTES
from casfs_mount.page_cache import NumberSet, PageCache


class File:
    """An open file whose content is at hand, or not (None)."""

    streamed = False

    def __init__(self, content: bytes | None) -> None:
        self.content = content
        self.asked: list[int] = []

    def read(self, offset: int, size: int) -> list[memoryview]:
        raise AssertionError("only the whole file is asked for")

    def whole(self, max_bytes: int) -> bytes | None:
        self.asked.append(max_bytes)
        return self.content


class Kernel:
    """Remembers what is stored in its page cache; `fails` makes the notification fail."""

    def __init__(self) -> None:
        self.stored: list[tuple[int, int, bytes]] = []
        self.fails = False

    def store(self, inode: int, offset: int, data: bytes) -> None:
        self.stored.append((inode, offset, data))
        if self.fails:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def pages(kernel: Kernel) -> PageCache:
    return PageCache(kernel.store)


def test_a_file_is_stored_while_it_is_opened_for_the_first_time(
    pages: PageCache, kernel: Kernel
) -> None:
    file = File(b"content")
    assert pages.on_open(7, 7, file)
    assert kernel.stored == [(7, 0, b"content")]
    assert file.asked == [MAX_SMALL_BYTES]
    pages.on_release(7)
    assert not pages.on_open(7, 7, file)
    assert len(kernel.stored) == 1


def test_a_file_that_is_open_is_never_stored_since_its_pages_may_be_locked(
    pages: PageCache, kernel: Kernel
) -> None:
    for _ in range(3):
        pages.on_open(7, 7, File(None))
    pages.on_release(7)
    pages.on_release(7)
    assert not pages.on_open(7, 7, File(b"content"))
    pages.on_release(7)
    pages.on_release(7)
    assert kernel.stored == []
    assert pages.on_open(7, 7, File(b"content"))


def test_names_of_a_hard_link_are_one_open_file(pages: PageCache, kernel: Kernel) -> None:
    inode = 1 << 62
    pages.on_open(7, inode, File(None))
    assert not pages.on_open(9, inode, File(b"content"))
    assert kernel.stored == []


def test_a_file_that_is_not_at_hand_is_left_to_its_read_request(
    pages: PageCache, kernel: Kernel
) -> None:
    assert not pages.on_open(7, 7, File(None))
    pages.on_read(7)
    pages.on_release(7)
    assert not pages.on_open(7, 7, File(b"content")), "the kernel has it from the reply"
    assert kernel.stored == []


def test_a_read_request_for_a_stored_file_shows_that_the_kernel_dropped_its_pages(
    pages: PageCache, kernel: Kernel
) -> None:
    for number in (7, 8):
        assert pages.on_open(number, number, File(b"content"))
        pages.on_release(number)
    assert not pages.on_open(7, 7, File(b"content"))
    pages.on_read(7)
    pages.on_release(7)
    assert not pages.on_open(7, 7, File(b"content")), "the kernel has it from the reply"
    assert pages.on_open(8, 8, File(b"content")), "it was dropped too"


def test_nothing_is_stored_after_the_kernel_has_refused(pages: PageCache, kernel: Kernel) -> None:
    kernel.fails = True
    assert not pages.on_open(7, 7, File(b"content"))
    kernel.fails = False
    assert not pages.on_open(8, 8, File(b"content"))
    assert len(kernel.stored) == 1


def test_nothing_is_asked_for_where_nothing_may_be_stored() -> None:
    pages = PageCache(None)
    file = File(b"content")
    assert not pages.on_open(7, 7, file)
    pages.on_read(7)
    pages.on_release(7)
    assert file.asked == []


def test_a_set_of_numbers_holds_exactly_what_was_added() -> None:
    numbers = NumberSet()
    added = [0, 1, 7, 8, 8191, 8192, 1 << 40, (1 << 61) - 1]
    for number in added:
        assert number not in numbers
        numbers.add(number)
        assert number in numbers
    assert 2 not in numbers and 8193 not in numbers
    numbers.clear()
    assert not any(number in numbers for number in added)


def test_a_set_of_numbers_forgets_the_least_recently_used_ones_beyond_its_bound() -> None:
    numbers = NumberSet(max_blocks=2)
    first, second, third = 0, 1 << 20, 1 << 30
    numbers.add(first)
    numbers.add(second)
    numbers.add(first + 1)
    numbers.add(third)
    assert second not in numbers
    assert first in numbers and first + 1 in numbers and third in numbers
