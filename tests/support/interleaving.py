"""Deterministic interleaving: several hosts in one process, stepped by their storage calls.

Each host is a thread with a storage of its own around the common one. A host stops before each call that
other hosts can notice, and goes on when the schedule says so; only one host runs at any time. A schedule is a
list of choices, so every run can be repeated. `explore` runs all schedules with a bounded number of
preemptions: a preemption leaves a host that could go on (the bound of CHESS, Musuvathi and Qadeer 2007).
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from casfs.errors import StorageDeniedError, StorageUnavailableError
from casfs.storage.base import Data, ListedObject, ObjectWriter, Storage
from casfs.storage.wrapper import StorageWrapper
from tests.support.storage_double import Call

T = TypeVar("T")

_WAIT_S = 60.0

_WRITES = frozenset(["create", "write", "commit", "delete"])


class HostDied(BaseException):
    """Raised in a host that is dead; each of its further calls raises it, too."""


class Fault(StrEnum):
    """What happens at one call of a host."""

    DIES = "dies"
    """The host dies before the call."""

    DIES_AND_LANDS_LATE = "dies and lands late"
    """The host dies, and the call takes effect when all other hosts are done."""

    REPEATED_LATE = "repeated late"
    """The call takes effect, and once more when all hosts are done, as a request that was tried twice."""

    UNANSWERED = "unanswered"
    """The call takes effect, and the host gets an error."""

    LISTING_FAILS = "listing fails"
    """A listing returns its first entry and then an error."""

    def applies(self, call: Call) -> bool:
        """Return whether the fault can happen at a call."""
        if self is Fault.LISTING_FAILS:
            return call.method == "list"
        return self is Fault.DIES or call.method in _WRITES


@dataclass(slots=True)
class Host:
    """One host: what it does, and at which of its calls (counted from 0) a fault happens."""

    name: str
    work: Callable[[Storage], None]
    fault: Fault | None = None
    fault_at: int = -1
    calls: list[Call] = field(default_factory=list)
    error: BaseException | None = None
    is_done: bool = False
    is_dead: bool = False
    may_go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    thread: threading.Thread | None = None


@dataclass(slots=True)
class Choice:
    """One choice of a run: who could go on, who was running, and who was chosen."""

    enabled: tuple[int, ...]
    running: int | None
    chosen: int


Chooser = Callable[[int, tuple[int, ...], int | None], int]
"""Returns who goes on, from the number of choices so far, who could go on, and who was running."""


def by_list(schedule: Sequence[int]) -> Chooser:
    """Choose by a list; after it, a host goes on as long as it can."""

    def choose(number: int, enabled: tuple[int, ...], running: int | None) -> int:
        if number < len(schedule) and schedule[number] in enabled:
            return schedule[number]
        return running if running in enabled else enabled[0]

    return choose


def by_chance(dice: random.Random, share: float) -> Chooser:
    """Choose another host with a probability of `share` at each call."""

    def choose(number: int, enabled: tuple[int, ...], running: int | None) -> int:
        if running in enabled and dice.random() >= share:
            return running
        return dice.choice(enabled)

    return choose


def by_turns(turns: Sequence[tuple[int, int | None]]) -> Chooser:
    """Let hosts go on in turn, each until it is about to make the call of a number, None: until it ends."""
    gone: Counter[int] = Counter()

    def choose(number: int, enabled: tuple[int, ...], running: int | None) -> int:
        for host, stop in turns:
            # The first time, a host goes on to its call 0.
            if host in enabled and (stop is None or gone[host] <= stop):
                gone[host] += 1
                return host
        return enabled[0]

    return choose


class Interleaving:
    """One run of several hosts by a schedule."""

    def __init__(self, storage: Storage, hosts: Sequence[Host]) -> None:
        self.hosts = hosts
        self.choices: list[Choice] = []
        self._storage = storage
        self._stopped = threading.Semaphore(0)
        self._late: list[Callable[[], object]] = []

    def run(self, choose: Chooser) -> None:
        """Run all hosts to their end; `choose` returns which goes on."""
        for host in self.hosts:
            host.thread = threading.Thread(target=self._run_host, args=(host,), daemon=True)
            host.thread.start()
            self._wait()
        running: int | None = None
        while enabled := tuple(n for n, host in enumerate(self.hosts) if not host.is_done):
            chosen = choose(len(self.choices), enabled, running)
            self.choices.append(Choice(enabled, running, chosen))
            running = chosen
            self.hosts[chosen].may_go.release()
            self._wait()
        for host in self.hosts:
            assert host.thread is not None
            host.thread.join(_WAIT_S)
        for action in self._late:
            action()

    def _wait(self) -> None:
        assert self._stopped.acquire(timeout=_WAIT_S), [host.calls[-3:] for host in self.hosts]

    def _run_host(self, host: Host) -> None:
        try:
            self._pause(host)
            host.work(_SteppedStorage(self._storage, self, host))
        except BaseException as error:
            host.error = error
        host.is_done = True
        self._stopped.release()

    def _pause(self, host: Host) -> None:
        self._stopped.release()
        assert host.may_go.acquire(timeout=_WAIT_S), f"{host.name} was never chosen"

    def step(self, host: Host, call: Call, action: Callable[[], T]) -> T:
        """Run a call of a host when the schedule says so, with the host's fault."""
        if host.is_dead:
            raise HostDied
        self._pause(host)
        number = len(host.calls)
        host.calls.append(call)
        if number != host.fault_at or host.fault is None:
            return action()
        if host.fault in (Fault.DIES, Fault.DIES_AND_LANDS_LATE):
            if host.fault is Fault.DIES_AND_LANDS_LATE:
                self._late.append(action)
            host.is_dead = True
            raise HostDied
        result = action()
        if host.fault is Fault.REPEATED_LATE:
            self._late.append(action)
        elif host.fault is Fault.UNANSWERED:
            raise StorageUnavailableError(call.method, call.name, TimeoutError(110, "no answer"))
        return result

    def fails_listing(self, host: Host) -> bool:
        """Return whether the listing that a host has just begun is the one that fails."""
        return host.fault is Fault.LISTING_FAILS and len(host.calls) - 1 == host.fault_at


class _SteppedStorage(StorageWrapper):
    """A host's storage: it stops before writes and each page of a listing. Presence objects are refused."""

    def __init__(self, inner: Storage, run: Interleaving, host: Host) -> None:
        super().__init__(inner)
        self._run = run
        self._host = host

    def _step(self, method: str, name: str, action: Callable[[], T]) -> T:
        return self._run.step(self._host, Call(method, name), action)

    def list(self, prefix: str) -> Iterator[ListedObject]:
        if prefix == "presence":
            return iter(())
        first = self._step("list", prefix, lambda: self._page(prefix))
        if not first:
            return iter(())
        if self._run.fails_listing(self._host):
            return _failing(first[:1], prefix)
        after = first[-1].name
        second = self._step("list", prefix, lambda: self._page(prefix, after))
        return iter([*first, *second])

    def _page(self, prefix: str, after: str = "") -> Sequence[ListedObject]:
        """Return the first half of a listing, or what now follows a name.

        So objects that appear between the two pages are listed or not, as in a long listing.
        """
        found = [one for one in self.inner.list(prefix) if one.name > after]
        return found if after else found[: (len(found) + 1) // 2]

    def size(self, name: str) -> int:
        self._require_life()
        return self.inner.size(name)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        self._require_life()
        return self.inner.read(name, offset, size)

    def write(self, name: str, data: Data) -> None:
        self._refuse_presence(name)
        kept = bytes(data)
        self._step("write", name, lambda: self.inner.write(name, kept))

    def create(self, name: str, data: Data) -> None:
        self._refuse_presence(name)
        kept = bytes(data)
        self._step("create", name, lambda: self.inner.create(name, kept))

    def delete(self, name: str) -> None:
        self._step("delete", name, lambda: self.inner.delete(name))

    def open_writer(self, in_memory: bool) -> ObjectWriter:
        return _SteppedWriter(self)

    def _require_life(self) -> None:
        if self._host.is_dead:
            raise HostDied

    def _refuse_presence(self, name: str) -> None:
        self._require_life()
        if name.startswith("presence/"):
            raise StorageDeniedError("write", name, PermissionError(13, "not in this test"))


def _failing(listed: Sequence[ListedObject], prefix: str) -> Iterator[ListedObject]:
    yield from listed
    raise StorageUnavailableError("list", prefix, TimeoutError(110, "no second page"))


class _SteppedWriter:
    def __init__(self, storage: _SteppedStorage) -> None:
        self._storage = storage
        self._data = bytearray()

    def append(self, data: Data) -> None:
        self._data += data

    def commit(self, name: str) -> None:
        kept = bytes(self._data)
        self._storage._step("commit", name, lambda: self._storage.inner.create(name, kept))

    def discard(self) -> None:
        self._data.clear()


def preemptions(choices: Sequence[Choice]) -> int:
    """Return how many of some choices leave a host that could have gone on."""
    return sum(one.running in one.enabled and one.chosen != one.running for one in choices)


def explore(
    run: Callable[[Chooser], Sequence[Choice]],
    bound: int,
    limit: int | None = None,
    dice: random.Random | None = None,
) -> int:
    """Run every schedule with at most `bound` preemptions; return the number of runs.

    `run` runs one schedule and returns its choices. With a limit, `dice` chooses which schedules are run.
    """
    count = 0
    waiting: list[list[int]] = [[]]
    while waiting and (limit is None or count < limit):
        schedule = waiting.pop(dice.randrange(len(waiting)) if dice is not None else -1)
        choices = run(by_list(schedule))
        count += 1
        for number in range(len(schedule), len(choices)):
            choice = choices[number]
            before = choices[:number]
            for other in choice.enabled:
                changed = Choice(choice.enabled, choice.running, other)
                if other != choice.chosen and preemptions([*before, changed]) <= bound:
                    waiting.append([*(one.chosen for one in before), other])
    return count


def faults_of(calls: Mapping[str, Sequence[Call]]) -> Iterator[tuple[str, int, Fault]]:
    """Yield every fault that can happen at one call of one host."""
    for name, made in calls.items():
        for number, call in enumerate(made):
            for fault in Fault:
                if fault.applies(call):
                    yield name, number, fault
