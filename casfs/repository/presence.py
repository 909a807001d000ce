"""Presence objects: which processes use a repository that is reached over a network.

A process writes a small object when it opens such a repository, refreshes it while it runs, and deletes it at
its end if it may. The objects are a courtesy: `casfs locks` prints them, and a prune waits longer for
processes that it sees. Nothing depends on them, so an object that a process left behind is harmless.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from dataclasses import dataclass
from itertools import islice

import msgspec

from casfs.errors import CasfsError, NotFoundError, StorageDeniedError
from casfs.json_document import InvalidJsonError, parse_json
from casfs.storage.base import ListedObject, Storage
from casfs.storage.clock import StorageClock, elapsed_ns
from casfs.storage.concurrency import in_order
from casfs.storage.locks import LockMode, LockRecord

log = logging.getLogger(__name__)

FOLDER = "presence"

REFRESH_S = 600.0
"""How often a process refreshes its object."""

STALE_NS = 1_800_000_000_000
"""A process whose object is older has probably ended, or its machine is suspended."""

_END_S = 5.0
"""How long `end` waits for a refresh that is under way, and then for the deletion."""

_NAME = re.compile(FOLDER + "/[0-9a-f]{32}")
_MAX_BYTES = 4096
_MOST_OBJECTS = 10_000


@dataclass(frozen=True, slots=True)
class PresentProcess:
    """A process as its presence object describes it; times are nanoseconds by the storage's clock."""

    record: LockRecord
    seen_ns: int
    """When it wrote or refreshed its object."""

    def is_stale(self, now_ns: int) -> bool:
        """Return whether the process has not refreshed its object for so long that it has probably ended."""
        return now_ns - self.seen_ns > STALE_NS


class Presence:
    """The presence object of this process, refreshed by a thread until `end`."""

    def __init__(
        self,
        storage: Storage,
        clock: StorageClock,
        mode: LockMode,
        verb: str,
        host: str | None = None,
        refresh_s: float = REFRESH_S,
    ) -> None:
        host = host if host is not None else os.uname().nodename
        self.name = f"{FOLDER}/{os.urandom(16).hex()}"
        self._storage = storage
        self._clock = clock
        self._record = LockRecord(mode, verb, host, os.getpid(), int(time.time()))
        self._refresh_s = refresh_s
        self._names: list[str] = []
        self._written_ns = 0
        self._shown = threading.Event()
        self._clock_set = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, in_background: bool = False) -> None:
        """Write the object, which sets the clock too; then refresh it from time to time.

        Raise nothing: where the object cannot be written, the process is not shown. `in_background` leaves
        the first write to the thread as well.
        """
        if not in_background:
            self._write()
        self._thread = threading.Thread(
            target=self._run, args=(in_background,), name="casfs-presence", daemon=True
        )
        self._thread.start()

    def wait_until_shown(self) -> None:
        """Wait until the object is written for the first time, or cannot be."""
        self._shown.wait()

    def wait_for_clock(self) -> None:
        """Wait until the first object has set the clock, or cannot."""
        self._clock_set.wait()

    def is_fresh(self) -> bool:
        """Return whether no other process can take this one for stale for some time."""
        return bool(self._names) and elapsed_ns() - self._written_ns < STALE_NS // 2

    def end(self) -> None:
        """Stop refreshing and delete the object where that is allowed; raise nothing.

        A storage that is away is not waited for: the object goes stale by itself. The caller closes the
        storage, which ends the attempts.
        """
        self._ended.set()
        if self._thread is not None:
            self._thread.join(_END_S)
        if self._names:
            deletion = threading.Thread(target=self._delete, name="casfs-presence-end", daemon=True)
            deletion.start()
            deletion.join(_END_S)

    def _delete(self) -> None:
        names, self._names = self._names, []
        for name in names:
            try:
                self._storage.delete(name)
            except CasfsError as error:
                log.debug("a presence object stays: %s", error)

    def _run(self, write_first: bool) -> None:
        if write_first:
            self._write()
        while not self._ended.wait(self._refresh_s):
            self._write()

    def _write(self) -> None:
        try:
            data = msgspec.json.encode(self._record) + b"\n"
            try:
                mtime_ns = self._clock.write(self.name, data, self._shown.set)
            except StorageDeniedError:
                # A credential may be allowed to create and not to overwrite.
                self.name = f"{FOLDER}/{os.urandom(16).hex()}"
                mtime_ns = self._clock.create(self.name, data, self._shown.set)
            self._written_ns = elapsed_ns()
            if self.name not in self._names:
                self._names.append(self.name)
            if not self._record.since_ns:
                self._record = msgspec.structs.replace(self._record, since_ns=mtime_ns)
        except CasfsError as error:
            log.debug("the presence of this process is not shown: %s", error)
        finally:
            self._shown.set()
            self._clock_set.set()


def present_processes(storage: Storage) -> dict[str, PresentProcess]:
    """Return the processes that presence objects describe, by the names of the objects.

    Objects that cannot be read are omitted. The caller decides by `is_stale` which have probably ended.
    """
    found: dict[str, PresentProcess] = {}
    entries = _listed(storage)
    reads = in_order(storage, lambda entry: _read_record(storage, entry.name), entries)
    for entry, record in zip(entries, reads, strict=True):
        if record is None:
            continue
        # A process cannot have begun after it was last seen.
        since_ns = min(record.since_ns or entry.mtime_ns, entry.mtime_ns)
        record = msgspec.structs.replace(record, since_ns=since_ns)
        found[entry.name] = PresentProcess(record, entry.mtime_ns)
    return found


def old_presence_objects(storage: Storage, before_ns: int) -> list[str]:
    """Return the names of the objects that no process has refreshed since a time; one listing."""
    return [entry.name for entry in _listed(storage) if entry.mtime_ns < before_ns]


def _listed(storage: Storage) -> list[ListedObject]:
    """Return the entries of presence objects, but not more than are read."""
    named = (entry for entry in storage.list(FOLDER) if _NAME.fullmatch(entry.name))
    found = list(islice(named, _MOST_OBJECTS + 1))
    if len(found) > _MOST_OBJECTS:
        log.warning("%s has more than %d presence objects", storage.url, _MOST_OBJECTS)
    return found[:_MOST_OBJECTS]


def _read_record(storage: Storage, name: str) -> LockRecord | None:
    try:
        return parse_json(storage.read(name, 0, _MAX_BYTES), LockRecord)
    except (NotFoundError, InvalidJsonError):
        return None
