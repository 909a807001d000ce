"""pyfuse3's event library: no checkpoint while requests follow each other, and every task gets its turn."""

from __future__ import annotations

import errno
import os
import re
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
import trio
import trio.testing
from casfs_mount.event_library import (
    MAX_TURNS,
    MAX_TURNS_S,
    POLL_MS,
    EventLibrary,
    RequestLock,
    RequestWait,
    fast_event_library,
)


class CountingPoll:
    """A real poll that counts its calls; `fails` makes them raise, `found` replaces their results."""

    def __init__(self) -> None:
        self.calls = 0
        self.fails = False
        self.timeouts: set[float | None] = set()
        self._poll = select.poll()

    def register(self, fd: int, eventmask: int, /) -> None:
        self._poll.register(fd, eventmask)

    def poll(self, timeout: float | None, /) -> list[tuple[int, int]]:
        self.calls += 1
        self.timeouts.add(timeout)
        if self.fails:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return self._poll.poll(timeout)


class Ahead:
    """Work of so many pieces; `on_piece` is called after each with the number of those done."""

    def __init__(self) -> None:
        self.pieces = 0
        self.done = 0
        self.on_piece: Callable[[int], object] = lambda done: None

    def is_due(self) -> bool:
        return self.pieces > 0

    def work(self) -> bool:
        assert self.pieces > 0
        self.pieces -= 1
        self.done += 1
        self.on_piece(self.done)
        return self.pieces > 0


class Scene:
    """A pipe, a wait for its reading end, and what the wait depends on."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        self.poll = CountingPoll()
        self.ahead = Ahead()
        self.idle = True
        self.successor = True
        self.now = 0.0
        self.wait = RequestWait(
            lambda: self.idle,
            lambda: self.successor,
            self.ahead,
            make_poll=lambda: self.poll,
            clock=lambda: self.now,
        )

    async def wait_readable(self) -> None:
        await self.wait.wait_readable(self.reading)

    async def begin(self) -> None:
        """Make the descriptor readable and take the first wait, which always goes through trio."""
        os.write(self.writing, b"!")
        await self.wait_readable()

    async def goes_through_trio(self) -> bool:
        """Wait, and return whether that was a checkpoint."""
        try:
            with trio.testing.assert_no_checkpoints():
                await self.wait_readable()
        except AssertionError:
            return True
        return False

    def close(self) -> None:
        for fd in (self.reading, self.writing):
            if fd >= 0:
                os.close(fd)


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.close()


class TestRequestLock:
    async def test_a_free_lock_is_acquired_and_released_without_a_checkpoint(self) -> None:
        lock = RequestLock()
        with trio.testing.assert_no_checkpoints():
            for _ in range(3):
                async with lock:
                    pass

    async def test_a_held_lock_suspends_all_other_tasks_and_each_gets_it_in_the_end(self) -> None:
        lock = RequestLock()
        inside = 0
        done: list[int] = []

        async def use(number: int) -> None:
            nonlocal inside
            async with lock:
                inside += 1
                assert inside == 1, "two tasks hold the lock"
                await trio.lowlevel.checkpoint()
                inside -= 1
            done.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(use, number)
        assert sorted(done) == list(range(20))

    async def test_the_lock_may_be_acquired_again_before_a_waiting_task_runs(self) -> None:
        lock = RequestLock()
        got = trio.Event()

        async def other() -> None:
            async with lock:
                got.set()

        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(other)
                await trio.testing.wait_all_tasks_blocked()
            with trio.testing.assert_no_checkpoints():
                async with lock:
                    assert not got.is_set()
            await got.wait()

    async def test_a_task_that_suspends_elsewhere_leaves_the_lock_to_the_waiting_task(self) -> None:
        lock = RequestLock()
        turns: list[str] = []

        async def other() -> None:
            async with lock:
                turns.append("other")

        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(other)
                await trio.testing.wait_all_tasks_blocked()
            async with lock:
                turns.append("first")
            await trio.testing.wait_all_tasks_blocked()
            turns.append("first, again")
        assert turns == ["first", "other", "first, again"]

    async def test_a_wakeup_is_not_lost_when_the_woken_task_is_cancelled(self) -> None:
        lock = RequestLock()
        done = trio.Event()

        async def cancelled(scope: trio.CancelScope) -> None:
            with scope:
                async with lock:
                    await trio.sleep_forever()

        async def other() -> None:
            async with lock:
                done.set()

        scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(cancelled, scope)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(other)
                await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            with trio.fail_after(30):
                await done.wait()

    async def test_a_woken_task_counts_as_waiting_until_it_has_the_lock(self) -> None:
        lock = RequestLock()
        assert not lock.is_awaited()

        async def other() -> None:
            async with lock:
                assert not lock.is_awaited()

        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(other)
                assert not lock.is_awaited()
                await trio.testing.wait_all_tasks_blocked()
                assert lock.is_awaited()
            assert lock.is_awaited()
        assert not lock.is_awaited()

    async def test_an_error_inside_releases_the_lock(self) -> None:
        lock = RequestLock()
        with pytest.raises(ZeroDivisionError):
            async with lock:
                raise ZeroDivisionError
        with trio.testing.assert_no_checkpoints():
            async with lock:
                pass


class TestRequestWait:
    async def test_a_request_that_has_arrived_costs_no_checkpoint(self, scene: Scene) -> None:
        await scene.begin()
        with trio.testing.assert_no_checkpoints():
            await scene.wait_readable()
        assert (scene.poll.calls, scene.poll.timeouts) == (1, {POLL_MS})

    async def test_other_tasks_run_after_so_many_requests_in_a_row(self, scene: Scene) -> None:
        await scene.begin()
        for _ in range(MAX_TURNS):
            assert not await scene.goes_through_trio()
        assert await scene.goes_through_trio()
        assert not await scene.goes_through_trio()

    async def test_other_tasks_run_after_some_time_however_few_requests_there_were(
        self, scene: Scene
    ) -> None:
        await scene.begin()
        scene.now += MAX_TURNS_S / 2
        assert not await scene.goes_through_trio()
        scene.now += MAX_TURNS_S
        assert await scene.goes_through_trio()

    async def test_a_steady_stream_of_requests_can_be_cancelled(self, scene: Scene) -> None:
        await scene.begin()
        turns = 0
        with trio.CancelScope() as scope:
            scope.cancel()
            while turns <= MAX_TURNS:
                await scene.wait_readable()
                turns += 1
        assert scope.cancelled_caught
        assert turns == MAX_TURNS

    async def test_a_timer_expires_during_a_steady_stream_of_requests(self, scene: Scene) -> None:
        await scene.begin()
        with trio.move_on_after(0.01) as scope:
            while True:
                await scene.wait_readable()
        assert scope.cancelled_caught

    async def test_no_wait_is_on_the_spot_while_a_worker_thread_is_busy(self, scene: Scene) -> None:
        await scene.begin()
        scene.idle = False
        assert await scene.goes_through_trio()
        assert scene.poll.calls == 0
        scene.idle = True
        assert not await scene.goes_through_trio()

    async def test_no_wait_is_on_the_spot_while_no_other_task_is_ready_to_wait(
        self, scene: Scene
    ) -> None:
        await scene.begin()
        scene.successor = False
        assert await scene.goes_through_trio()
        scene.successor = True
        assert not await scene.goes_through_trio()

    async def test_an_idle_mount_polls_once_and_then_sleeps_in_trio(self, scene: Scene) -> None:
        await scene.begin()
        os.read(scene.reading, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.wait_readable)
            await trio.testing.wait_all_tasks_blocked()
            statistics = trio.lowlevel.current_statistics()
            assert statistics.tasks_runnable == 0
            assert statistics.seconds_to_next_deadline == float("inf")
            assert scene.poll.calls == 1
            os.write(scene.writing, b"!")
        assert scene.poll.calls == 1

    async def test_work_is_done_ahead_only_while_no_request_is_there(self, scene: Scene) -> None:
        await scene.begin()
        scene.ahead.pieces = 3
        assert not await scene.goes_through_trio()
        assert scene.ahead.done == 0, "a request was there"
        os.read(scene.reading, 1)
        scene.ahead.on_piece = lambda done: done == 2 and os.write(scene.writing, b"!")
        assert not await scene.goes_through_trio()
        assert (scene.ahead.done, scene.ahead.pieces) == (2, 1)

    async def test_work_ahead_ends_with_the_time_of_a_turn(self, scene: Scene) -> None:
        await scene.begin()
        os.read(scene.reading, 1)
        scene.ahead.pieces = 1 << 30

        def pass_time(done: int) -> None:
            scene.now += MAX_TURNS_S / 10

        scene.ahead.on_piece = pass_time
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.wait_readable)
            await trio.testing.wait_all_tasks_blocked()
            assert 9 <= scene.ahead.done <= 11
            os.write(scene.writing, b"!")

    async def test_no_work_is_done_ahead_while_a_worker_thread_is_busy(self, scene: Scene) -> None:
        await scene.begin()
        scene.ahead.pieces = 3
        scene.idle = False
        assert await scene.goes_through_trio()
        assert scene.ahead.done == 0

    async def test_a_failed_poll_leaves_the_wait_to_trio(self, scene: Scene) -> None:
        await scene.begin()
        scene.poll.fails = True
        for expected in (1, 2):
            assert await scene.goes_through_trio()
            assert scene.poll.calls == expected

    async def test_a_hang_up_ends_the_wait(self, scene: Scene) -> None:
        await scene.begin()
        os.read(scene.reading, 1)
        os.close(scene.writing)
        scene.writing = -1
        with trio.testing.assert_no_checkpoints():
            await scene.wait_readable()

    async def test_an_invalid_descriptor_raises_the_error_of_trio(self, scene: Scene) -> None:
        await scene.begin()
        await scene.wait_readable()
        os.close(scene.reading)
        number, scene.reading = scene.reading, -1
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            await scene.wait.wait_readable(number)

    async def test_closing_ends_a_wait_that_sleeps(self, scene: Scene) -> None:
        closed = False

        async def wait() -> None:
            nonlocal closed
            with pytest.raises(trio.ClosedResourceError):
                await scene.wait_readable()
            closed = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            library: Any = EventLibrary(lambda: True)
            library.lowlevel.notify_closing(scene.reading)
        assert closed


class TestFastEventLibrary:
    def test_pyfuse3_has_trio_again_afterwards(self) -> None:
        with pytest.raises(ZeroDivisionError), fast_event_library(lambda: True) as fast:
            assert fast
            assert isinstance(library_of_pyfuse3(), EventLibrary)
            raise ZeroDivisionError
        assert library_of_pyfuse3() is trio

    def test_another_event_library_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        other = object()
        monkeypatch.setattr(pyfuse3, "trio", other)
        with fast_event_library(lambda: True) as fast:
            assert not fast
            assert library_of_pyfuse3() is other
        assert library_of_pyfuse3() is other

    def test_a_pyfuse3_without_the_attribute_stays_as_it_is(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(pyfuse3, "trio")
        with fast_event_library(lambda: True) as fast:
            assert not fast
            assert not hasattr(pyfuse3, "trio")

    def test_everything_that_the_source_of_pyfuse3_takes_from_trio_is_there(self) -> None:
        library = EventLibrary(lambda: True)
        names = set()
        folder = Path(pyfuse3.__file__).parent
        for path in [*folder.glob("*.pyx"), *folder.glob("*.pxi")]:
            names |= set(
                re.findall(r"\btrio\.((?:lowlevel\.)?[A-Za-z_]+)\b(?!_)", path.read_text())
            )
        assert {"Lock", "open_nursery", "ClosedResourceError"} <= names
        assert {"lowlevel.wait_readable", "lowlevel.notify_closing"} <= names
        obsolete = {"run_sync_in_worker_thread", "readthedocs"}  # of its documentation
        for name in names - obsolete:
            value: Any = library
            for part in name.split("."):
                value = getattr(value, part)


def library_of_pyfuse3() -> object:
    return vars(pyfuse3)["trio"]
