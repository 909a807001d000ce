"""The index file's fingerprint: detects foreign or torn changes before LMDB opens the file.

LMDB trusts its file: a damaged page, or a page missing from a truncated file, crashes the process with a
signal that cannot be caught. So a writer that closes a changed index stores a fingerprint beside it: size,
mtime and, up to a size limit, the digest of the file. If the fingerprint does not match (a writer was killed,
or another program changed the file), a subprocess first reads the whole index.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from blake3 import blake3

from casfs.errors import IndexUnusableError
from casfs.index.index import DATA_FILE, LOCK_FILE, Index

log = logging.getLogger(__name__)

FINGERPRINT_FILE = "seal"
_HASHED_BYTES = 64 * 1024 * 1024
"""Larger files are identified by size and mtime only, because hashing them would slow every command."""

_MAX_FINGERPRINT_BYTES = 4096
_PROBE_S = 600
_FORM = "casfs index seal 1: {size} {mtime_ns} {digest}\n"
_DAMAGED_MARK = b"casfs index seal 1: damaged\n"


def write_fingerprint(path: Path) -> None:
    """Write the fingerprint of an index that this process does not have open.

    Log a failure; raise nothing.
    """
    data, fingerprint = path / DATA_FILE, path / FINGERPRINT_FILE
    temporary = path / f"{FINGERPRINT_FILE}.{os.getpid()}"
    try:
        before = os.stat(data)
        digest = _digest(data, before.st_size)
        if _state(before) != _state(os.stat(data)):
            fingerprint.unlink(missing_ok=True)
            return
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            size, mtime_ns = _state(before)
            file.write(_FORM.format(size=size, mtime_ns=mtime_ns, digest=digest).encode())
        os.rename(temporary, fingerprint)
    except OSError as error:
        log.info("the index in %s gets no fingerprint: %s", path, error)


def mark_index_damaged(path: Path) -> None:
    """Mark the index damaged; the next opener rebuilds it.

    A whole read of the index may not find the damage that was noticed. While a writer lives, the mark has no
    effect. Log a failure; raise nothing.
    """
    try:
        (path / FINGERPRINT_FILE).write_bytes(_DAMAGED_MARK)
    except OSError as error:
        log.info("the index in %s cannot be marked damaged: %s", path, error)


def remove_fingerprint(path: Path) -> None:
    """Remove the fingerprint; the next opener first reads the whole index in a subprocess."""
    (path / FINGERPRINT_FILE).unlink(missing_ok=True)


def is_intact(path: Path, in_use: bool) -> bool:
    """Return whether LMDB can safely open the index in a folder; True if the folder has no index.

    `in_use` means that a writer lives: then the file may differ from its fingerprint but must not be shorter.
    """
    data = path / DATA_FILE
    try:
        st = os.stat(data)
    except OSError:
        return True
    if _is_marked_damaged(path):
        return in_use
    recorded = _read_fingerprint(path)
    if recorded is not None:
        size, mtime_ns, digest = recorded
        if st.st_size < size:
            return False
        if (size, mtime_ns) == _state(st):
            try:
                # If another process changes the file meanwhile, size or mtime shows it and the probe decides.
                found = _digest(data, size) if digest != "-" else digest
            except OSError:
                return False
            if found == digest or _state(os.stat(data)) == (size, mtime_ns):
                return found == digest
        elif in_use:
            return True
    elif st.st_size == 0:
        return False
    elif in_use:
        return True
    if _survives_a_probe(path):
        write_fingerprint(path)
        return True
    return False


def delete_index(path: Path) -> None:
    """Delete a damaged index, so that a new one can be created.

    A process that has the old index open continues with the removed file.
    """
    for name in (FINGERPRINT_FILE, DATA_FILE, LOCK_FILE):
        (path / name).unlink(missing_ok=True)


def read_whole_index(path: Path) -> int:
    """Read everything in an index and return its number of blobs; raise IndexUnusableError.

    A damaged index may crash the process, so run this only in a subprocess.
    """
    index = Index(path, readonly=True)
    try:
        # Damage outside the entries would otherwise stay unnoticed until the next write.
        index.environment.verify_pages()
        packs = {record.ordinal for record in index.packs()}
        count = 0
        for _, location in index.blobs():
            count += 1
            if location.pack not in packs:
                raise IndexUnusableError(f"the index {path} refers to an unknown pack")
        if count != index.blob_count() or not index.marked_for_removal() <= packs:
            raise IndexUnusableError(f"the index {path} is inconsistent")
    finally:
        index.close()
    return count


def _survives_a_probe(path: Path) -> bool:
    """Return whether a subprocess can read the whole index; a crash there does no harm here."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-P", "-c", _PROBE, str(root), str(path)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_PROBE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


_PROBE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from casfs.index.fingerprint import read_whole_index
read_whole_index(Path(sys.argv[2]))
"""


def _state(st: os.stat_result) -> tuple[int, int]:
    return st.st_size, st.st_mtime_ns


def _digest(path: Path, size: int) -> str:
    if size > _HASHED_BYTES:
        return "-"
    hasher = blake3()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(1 << 20):
            hasher.update(data)
    return hasher.hexdigest()


def _is_marked_damaged(path: Path) -> bool:
    try:
        with open(path / FINGERPRINT_FILE, "rb") as file:
            return file.read(_MAX_FINGERPRINT_BYTES) == _DAMAGED_MARK
    except OSError:
        return False


def _read_fingerprint(path: Path) -> tuple[int, int, str] | None:
    try:
        with open(path / FINGERPRINT_FILE, "rb") as file:
            text = file.read(_MAX_FINGERPRINT_BYTES).decode()
        size, mtime_ns, digest = text.removeprefix(_FORM.partition("{")[0]).split()
        return int(size), int(mtime_ns), digest
    except (OSError, ValueError):
        return None
