"""Whether an index file is what casfs left there, asked before LMDB is let near it.

LMDB believes its file: a page that rotted, or that is missing because the file was cut, ends the process
with a signal that nothing can catch. So whoever closes an index that it changed leaves a seal beside
it: size, time of change, and the digest of a file that is not too large. Where the seal does not fit (a
writer was killed, or somebody else changed the file) another process reads the whole index first.
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
"""Larger files are known by size and time only: hashing them would be felt at every command."""

_MAX_FINGERPRINT_BYTES = 4096
_PROBE_S = 600
_FORM = "casfs index seal 1: {size} {mtime_ns} {digest}\n"
_REFUSED = b"casfs index seal 1: damaged\n"


def write_fingerprint(path: Path) -> None:
    """Seal the index in a folder that nobody in this process has open; does nothing where it cannot."""
    data, seal = path / DATA_FILE, path / FINGERPRINT_FILE
    temporary = path / f"{FINGERPRINT_FILE}.{os.getpid()}"
    try:
        before = os.stat(data)
        digest = _digest(data, before.st_size)
        if _state(before) != _state(os.stat(data)):
            seal.unlink(missing_ok=True)
            return
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            size, mtime_ns = _state(before)
            file.write(_FORM.format(size=size, mtime_ns=mtime_ns, digest=digest).encode())
        os.rename(temporary, seal)
    except OSError as error:
        log.info("the index in %s cannot be sealed: %s", path, error)


def mark_damaged(path: Path) -> None:
    """Have the index in a folder be built anew by who uses it next: it was found to be damaged.

    Reading all of it need not show that. While somebody writes it is left to that one.
    """
    try:
        (path / FINGERPRINT_FILE).write_bytes(_REFUSED)
    except OSError as error:
        log.info("that the index in %s is damaged cannot be noted: %s", path, error)


def clear(path: Path) -> None:
    """Have the index in a folder be read as a whole before it is used the next time."""
    (path / FINGERPRINT_FILE).unlink(missing_ok=True)


def is_intact(path: Path, in_use: bool) -> bool:
    """Tell whether the index in a folder can be given to LMDB; True where there is none.

    `in_use` says that a writer lives: then the file may differ from what was sealed, but never be
    shorter.
    """
    data = path / DATA_FILE
    try:
        st = os.stat(data)
    except OSError:
        return True
    if _is_marked_damaged(path):
        return in_use
    told = _read_fingerprint(path)
    if told is not None:
        size, mtime_ns, digest = told
        if st.st_size < size:
            return False
        if (size, mtime_ns) == _state(st):
            try:
                # Where another changes the file meanwhile the state tells; then it is read by the probe.
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


def discard(path: Path) -> None:
    """Remove an index that is not sound, so that a new one can be made in its place.

    Whoever has it open goes on with the file that had the name.
    """
    for name in (FINGERPRINT_FILE, DATA_FILE, LOCK_FILE):
        (path / name).unlink(missing_ok=True)


def probe(path: Path) -> int:
    """Read everything in an index and return how many blobs it has; raises IndexUnusableError.

    Only for a process that may be killed by what it reads.
    """
    index = Index(path, readonly=True)
    try:
        # What lies between the entries is met by nobody until something is written.
        index.environment.verify_pages()
        packs = {record.ordinal for record in index.packs()}
        count = 0
        for _, location in index.blobs():
            count += 1
            if location.pack not in packs:
                raise IndexUnusableError(f"the index {path} names a pack that it does not have")
        if count != index.blob_count() or not index.marked_for_removal() <= packs:
            raise IndexUnusableError(f"the index {path} contradicts itself")
    finally:
        index.close()
    return count


def _survives_a_probe(path: Path) -> bool:
    """Have another process read the index; what kills it there does no harm here."""
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
from casfs.index.fingerprint import probe
probe(Path(sys.argv[2]))
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
            return file.read(_MAX_FINGERPRINT_BYTES) == _REFUSED
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
