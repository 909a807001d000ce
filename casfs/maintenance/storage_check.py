"""Check a storage without any key: read every object that is named by its digest, and compare the two.

The check needs neither the index nor an identity, so the operator of the storage can run it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from blake3 import blake3

from casfs.crypto.recipients import RECIPIENTS_NAME
from casfs.crypto.trust_root import TrustRoot
from casfs.errors import IntegrityError, NotFoundError, StorageError
from casfs.format import delta, generation
from casfs.format.key_derivation import SECRET_BYTES
from casfs.format.pack import HEADER, PACK_PREFIXES
from casfs.maintenance.findings import Finding, is_refused
from casfs.monitor import Monitor, Unit
from casfs.storage.base import Storage

FOLDERS = {
    "packs": "pack",
    "meta": "pack",
    "deltas": "delta",
    "snapshots": "snapshot",
    "sessions": "session",
    "identities": "identity",
    generation.FOLDER: "snapshot list",
    "condemned": "condemned",
}
"""The folders whose objects are named by their digest, with the kind of object in each."""


def digest_in_name(name: str) -> str:
    """Return the hexadecimal digest in the name of an object in one of the folders."""
    stem = name.rpartition("/")[2].partition(".")[0]
    return stem.rpartition("-")[2] if name.startswith(f"{delta.FOLDER}/") else stem


_WINDOW_BYTES = 8 * 1024 * 1024


@dataclass(slots=True)
class StorageCheck:
    """Counts of the objects and bytes read, and the damage found."""

    objects: int = 0
    read_bytes: int = 0
    damage: list[Finding] = field(default_factory=list)
    unreadable: list[Finding] = field(default_factory=list)


def check_storage(storage: Storage, trust: TrustRoot, monitor: Monitor) -> StorageCheck:
    """Recompute the digest of every object; raise StorageError where the storage cannot be listed."""
    config = trust.config
    result = StorageCheck()
    names = [item for folder in FOLDERS for item in storage.list(folder)]
    monitor.progress.begin(
        "reading objects",
        Unit.OBJECTS,
        total_items=len(names),
        total_bytes=sum(size for _, size, _ in names),
    )
    sessions = {name.split("/")[1] for name, _, _ in names if name.startswith("sessions/")}
    needed: dict[str, str] = {}
    for name, size, _ in names:
        head = b""
        try:
            head = storage.read(name, 0, delta.SESSION_HEADER)
            problem = _find_problem(storage, name, size, monitor)
        except NotFoundError:
            continue  # removed by a concurrent prune
        except StorageError as error:
            if is_refused(error):
                result.unreadable.append(Finding(FOLDERS[name.partition("/")[0]], str(error)))
                continue
            problem = str(error)
        result.objects += 1
        monitor.progress.items += 1
        result.read_bytes += size
        folder = name.partition("/")[0]
        if problem is not None:
            result.damage.append(Finding(FOLDERS[folder], f"{name}: {problem}"))
        elif folder in (*PACK_PREFIXES, "snapshots"):
            # In both formats the session id follows a header of the same size.
            needed.setdefault(head[HEADER.size : HEADER.size + SECRET_BYTES].hex(), name)
        elif folder == delta.FOLDER and (session_id := delta.session_of(head)) is not None:
            needed.setdefault(session_id.hex(), name)
    if config.encryption is not None:
        needed[config.encryption.session] = "the configuration"
        generations = _generations(result, storage, trust)
        needed.update((one.session, RECIPIENTS_NAME) for one in generations)
        for session, name in needed.items():
            if session not in sessions:
                message = f"session {session} is missing; {name} needs it"
                result.damage.append(Finding("session", message))
        listed = {name for name, _, _ in names}
        for one in generations:
            if one.list_name not in listed:
                message = f"{one.list_name} is missing; {RECIPIENTS_NAME} needs it"
                result.damage.append(Finding("snapshot list", message))
    return result


def _generations(
    result: StorageCheck, storage: Storage, trust: TrustRoot
) -> tuple[generation.Generation, ...]:
    """Return the records in the list of recipients; report a damaged list."""
    try:
        return trust.recipients(storage).generations
    except (IntegrityError, StorageError) as error:
        result.damage.append(Finding(RECIPIENTS_NAME, str(error)))
        return ()


def _find_problem(storage: Storage, name: str, size: int, monitor: Monitor) -> str | None:
    whole = blake3()
    done = 0
    while data := storage.read(name, done, _WINDOW_BYTES):
        whole.update(data)
        done += len(data)
        monitor.progress.done_bytes += len(data)
    if whole.hexdigest() != digest_in_name(name):
        return "digest mismatch"
    if done != size:
        return f"size mismatch: read {done} bytes, listed {size}"
    return None
