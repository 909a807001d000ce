"""Mirror: copy every object of a repository to another storage, without any key.

The order is that of a backup: keys, packs, index deltas, snapshots. The snapshots are listed before the
packs, so every snapshot that is copied finds its packs at the destination, and a mirror that is interrupted
anywhere leaves a repository with fewer snapshots. A prune of the destination may remove packs before their
snapshots are there, so the packs are looked at once more after the snapshots. Running it again continues:
objects are write-once and named by the digest of their bytes, so one of the same name and size is there
already.

Every object is digested on its way. One that is not what its name says is not copied and is reported; an
intact copy at the destination stays. Memory is bounded by a window of an object for each thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec
from blake3 import blake3
from msgspec.structs import replace

from casfs.crypto.recipients import RECIPIENTS_NAME
from casfs.errors import IntegrityError, NotFoundError, RefusedError
from casfs.format.config import CONFIG_NAME, MAX_CONFIG_BYTES, decode_config
from casfs.format.delta import FOLDER as DELTAS
from casfs.format.generation import FOLDER as DOMAINS
from casfs.format.pack import PACK_PREFIXES
from casfs.json_document import InvalidJsonError, parse_json
from casfs.maintenance.findings import Finding
from casfs.maintenance.storage_check import FOLDERS, digest_in_name
from casfs.monitor import Monitor
from casfs.repository.presence import present_processes
from casfs.repository.remote_writers import mark_remote_writers
from casfs.storage.base import ListedObject, Storage
from casfs.storage.locks import LockMode

log = logging.getLogger(__name__)

DEFAULT_MARGIN_S = 7 * 86_400
"""How long the destination keeps what the source no longer has: time to notice an attack on the source."""

KEY_FOLDERS = ("identities", "sessions", DOMAINS)
MISSING_NAME = "mirror/missing"
"""At the destination: since when the source lacks each object that the destination has."""

_WINDOW_BYTES = 8 * 1024 * 1024
_MAX_SMALL_BYTES = 16 << 20
_MAX_MISSING_BYTES = 1 << 30
_THREADS = 4
_IN_MEMORY_BYTES = 1 << 20


@dataclass(slots=True)
class MirrorResult:
    """Counts of a mirror; `pending` objects are no longer in the source and wait for the margin."""

    copied: int = 0
    copied_bytes: int = 0
    present: int = 0
    deleted: int = 0
    pending: int = 0
    damage: list[Finding] = field(default_factory=list)


class Mirror:
    """Copy one repository from `source` to `destination`; use each instance once.

    `config` is the configuration of the source, where the caller has read and verified it. `now_s` returns
    the time in seconds since 1970.
    """

    def __init__(
        self,
        source: Storage,
        destination: Storage,
        monitor: Monitor,
        *,
        config: bytes | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self.result = MirrorResult()
        self._present: dict[str, int] = {}
        self._source = source
        self._destination = destination
        self._monitor = monitor
        self._config = config
        self._now_s = now_s

    def run(self, delete: bool = False, margin_s: float = DEFAULT_MARGIN_S) -> MirrorResult:
        """Copy what the destination lacks; with `delete` remove what the source has lacked for `margin_s`.

        Nothing is deleted where an object could not be copied. Raises RefusedError for a destination that is
        another repository, NotFoundError for a source without a repository, IntegrityError for its damaged
        configuration, and StorageError.
        """
        self._copy_config()
        if not self._destination.capabilities.holds_locks:
            # A prune there by the locks of its machine would remove what no snapshot needs yet.
            mark_remote_writers(self._destination)
        listed = self._copy_objects()
        if delete and not self.result.damage:
            self._delete_missing(listed, margin_s)
        return self.result

    def _copy_config(self) -> None:
        """Copy the configuration, or verify that both are of the same repository; follow an upgrade."""
        data = self._config
        if data is None:
            data = self._source.read(CONFIG_NAME, 0, MAX_CONFIG_BYTES)
        config = decode_config(data, self._source.url)
        try:
            there = self._destination.read(CONFIG_NAME, 0, MAX_CONFIG_BYTES)
        except NotFoundError:
            if any(True for prefix in PACK_PREFIXES for _ in self._destination.list(prefix)):
                raise RefusedError(
                    f"{self._destination.url} has packs and no configuration; name an empty destination"
                ) from None
            self._destination.create(CONFIG_NAME, data)
            return
        other = decode_config(there, self._destination.url)
        if replace(other, format=config.format) != config:
            raise RefusedError(
                f"{self._destination.url} holds repository {other.id[:12]}, and {self._source.url} is "
                f"{config.id[:12]}; name another destination"
            )
        if other.format < config.format:
            # The source was upgraded. Before any object that only the new format has.
            self._destination.write(CONFIG_NAME, data)

    def _copy_objects(self) -> set[str]:
        """Copy keys, packs, deltas and snapshots; return the names that the source has."""
        copied: set[str] = set()
        while True:
            # Listed in this order, every delta finds its packs and its session at the destination.
            snapshots = list(self._source.list("snapshots"))
            deltas = list(self._source.list(DELTAS))
            others = [item for folder in KEY_FOLDERS for item in self._source.list(folder)]
            packs = [item for prefix in PACK_PREFIXES for item in self._source.list(prefix)]
            self._copy_all(item for item in others if item.name not in copied)
            self._copy_recipients()
            vanished = self._copy_all(item for item in packs if item.name not in copied)
            vanished += self._copy_all(item for item in deltas if item.name not in copied)
            copied.update(item.name for item in (*others, *packs, *deltas))
            if not vanished:
                break
            # A prune of the source removed them. It stored what snapshots need of the packs in new packs.
            log.info("%d objects vanished from %s; listing it again", vanished, self._source.url)
        before = self.result.copied
        self._copy_all(snapshots)
        self._copy_removed(packs)
        if self.result.copied > before:
            self._report_prune()
        return copied | {item.name for item in snapshots}

    def _copy_removed(self, packs: list[ListedObject]) -> None:
        """Copy packs again that a prune of the destination removed before their snapshots were there."""
        there = {item.name for prefix in PACK_PREFIXES for item in self._destination.list(prefix)}
        damaged = {finding.message.partition(":")[0] for finding in self.result.damage}
        removed = [item for item in packs if item.name not in there | damaged]
        if removed:
            log.warning(
                "%d packs were removed from %s meanwhile; copying them again",
                len(removed),
                self._destination.url,
            )
            self._copy_all(removed)

    def _report_prune(self) -> None:
        """Warn of a prune of the destination that may have listed the snapshots before new ones were there.

        The lock of a local destination keeps others from pruning it.
        """
        if self._destination.capabilities.holds_locks:
            return
        now_ns = int(self._now_s() * 1_000_000_000)
        if any(
            process.record.mode is LockMode.MAINTENANCE and not process.is_stale(now_ns)
            for process in present_processes(self._destination).values()
        ):
            log.warning(
                "a prune is at work in %s; mirror again when it has ended: what it removes meanwhile is "
                "copied then",
                self._destination.url,
            )

    def _copy_recipients(self) -> None:
        """Replace the list of recipients at the destination where it differs."""
        try:
            data = self._source.read(RECIPIENTS_NAME, 0, _MAX_SMALL_BYTES)
        except NotFoundError:
            return
        try:
            if self._destination.read(RECIPIENTS_NAME, 0, _MAX_SMALL_BYTES) == data:
                return
        except NotFoundError:
            pass
        self._destination.write(RECIPIENTS_NAME, data)

    def _copy_all(self, items: Iterable[ListedObject]) -> int:
        """Copy objects in parallel; return how many vanished from the source meanwhile."""
        wanted = [item for item in items if item.name.partition("/")[0] in FOLDERS]
        progress = self._monitor.progress
        progress.total_bytes = (progress.total_bytes or 0) + sum(item.size for item in wanted)
        vanished = 0
        threads = max(1, min(_THREADS, self._parallel_requests()))
        # A page of a listing costs as much as a question for the size of one object.
        folders = sorted({item.name.partition("/")[0] for item in wanted})
        self._present = {
            found.name: found.size for folder in folders for found in self._destination.list(folder)
        }
        with ThreadPoolExecutor(threads, "casfs-mirror") as pool:
            for item, outcome in zip(wanted, pool.map(self._copy, wanted), strict=True):
                self._monitor.progress.items += 1
                if outcome == "copied":
                    self.result.copied += 1
                    self.result.copied_bytes += item.size
                elif outcome == "present":
                    self.result.present += 1
                elif outcome == "vanished":
                    vanished += 1
                else:
                    kind = FOLDERS[item.name.partition("/")[0]]
                    self.result.damage.append(Finding(kind, f"{item.name}: {outcome}"))
        return vanished

    def _parallel_requests(self) -> int:
        return max(
            storage.capabilities.parallel_requests for storage in (self._source, self._destination)
        )

    def _copy(self, item: ListedObject) -> str:
        """Copy one object; return `copied`, `present`, `vanished`, or why it is not copied."""
        if self._present.get(item.name) == item.size:
            self._monitor.progress.done_bytes += item.size
            return "present"
        whole = blake3()
        done = 0
        writer = self._destination.open_writer(item.size <= _IN_MEMORY_BYTES)
        try:
            while done < item.size:
                try:
                    data = self._source.read(item.name, done, min(_WINDOW_BYTES, item.size - done))
                except NotFoundError:
                    return "vanished"
                if not data:
                    break
                whole.update(data)
                writer.append(data)
                done += len(data)
                self._monitor.progress.done_bytes += len(data)
            if done != item.size:
                return f"size mismatch: read {done} bytes, listed {item.size}"
            if whole.hexdigest() != digest_in_name(item.name):
                return "digest mismatch"
            writer.commit(item.name)
            return "copied"
        finally:
            writer.discard()

    def _delete_missing(self, listed: set[str], margin_s: float) -> None:
        """Delete what the source has lacked for the margin, snapshots first, then deltas, packs and keys."""
        now = int(self._now_s())
        before = self._read_missing()
        missing: dict[str, int] = {}
        for folder in ("snapshots", DELTAS, *PACK_PREFIXES, *KEY_FOLDERS):
            for item in list(self._destination.list(folder)):
                if item.name in listed:
                    continue
                since = before.get(item.name, now)
                # A time in the future, of a clock that was off, would keep the object for good.
                since = min(since, now)
                if now - since >= margin_s:
                    self._destination.delete(item.name)
                    self.result.deleted += 1
                else:
                    missing[item.name] = since
        self.result.pending = len(missing)
        if missing != before:
            self._destination.write(MISSING_NAME, msgspec.json.encode(missing))

    def _read_missing(self) -> dict[str, int]:
        try:
            data = self._destination.read(MISSING_NAME, 0, _MAX_MISSING_BYTES)
        except NotFoundError:
            return {}
        try:
            return parse_json(data, dict[str, int])
        except InvalidJsonError as error:
            raise IntegrityError(
                f"{MISSING_NAME} in {self._destination.url} is damaged ({error}); delete it, and the margin "
                "begins again"
            ) from error
