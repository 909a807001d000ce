"""The index file's fingerprint: detects foreign or torn changes before LMDB opens the file.

LMDB trusts its file: a damaged page, or a page missing from a truncated file, crashes the process with a
signal that cannot be caught, and a page that an attacker prepared may do more. So a writer that closes a
changed index stores a fingerprint beside it: size, mtime and, up to a size limit, the digest of the file,
with a message authentication code under a secret of the user. If the user's fingerprint does not match the
file (a writer was killed, or another program changed the file), a subprocess first reads the whole index. An
index without a fingerprint of this user is not opened at all: it is rebuilt. The exception is root's index,
which another user reads: root is trusted, and its secret is unknown.
"""

from __future__ import annotations

import enum
import logging
import os
import sys
from pathlib import Path

from blake3 import blake3

from casfs.atomic_file import replace_file
from casfs.digest import codes_equal
from casfs.errors import CasfsError, IndexUnusableError, NoHomeError
from casfs.index.index import DATA_FILE, LOCK_FILE, Index
from casfs.user_dirs import make_private_folder, user_folder

log = logging.getLogger(__name__)

FINGERPRINT_FILE = "seal"
_HASHED_BYTES = 64 * 1024 * 1024
"""Larger files are identified by inode and ctime, because hashing them would slow every command."""

_MAX_FINGERPRINT_BYTES = 4096
_PROBE_S = 600
_FORM = "casfs index seal 2: {size} {mtime_ns} {digest}"
_DAMAGED_MARK = b"casfs index seal 2: damaged\n"

SECRET_FILE = "index-secret"
_SECRET_BYTES = 32


class IndexState(enum.Enum):
    """What the fingerprint says of an index file."""

    INTACT = enum.auto()
    """LMDB can open it; also said of a folder without an index."""

    DAMAGED = enum.auto()

    FOREIGN = enum.auto()
    """This user did not write it, or its fingerprint is lost."""


def write_fingerprint(path: Path) -> None:
    """Write the fingerprint of an index that this process does not have open.

    Log a failure; raise nothing.
    """
    data = path / DATA_FILE
    try:
        key = _user_secret()
        before = os.stat(data)
        digest = _digest(data, before)
        if _state(before) != _state(os.stat(data)):
            replace_file(path / FINGERPRINT_FILE, _stale_line(key))
            return
        size, mtime_ns = _state(before)
        line = _FORM.format(size=size, mtime_ns=mtime_ns, digest=digest)
        replace_file(path / FINGERPRINT_FILE, f"{line} {_code(key, line)}\n".encode())
    except (OSError, CasfsError) as error:
        log.info("the index in %s gets no fingerprint: %s", path, error)


def mark_index_damaged(path: Path) -> None:
    """Mark the index damaged; the next opener rebuilds it.

    A whole read of the index may not find the damage that was noticed. While a writer lives, the mark has no
    effect. Log a failure; raise nothing.
    """
    try:
        replace_file(path / FINGERPRINT_FILE, _DAMAGED_MARK)
    except OSError as error:
        log.info("the index in %s cannot be marked damaged: %s", path, error)


def require_probe(path: Path) -> None:
    """Let the next opener read the whole index in a subprocess first, if this user wrote it.

    Raise OSError.
    """
    try:
        key = _user_secret()
    except (OSError, CasfsError):
        return  # without a secret every opener does
    if (path / DATA_FILE).exists() and _read_fingerprint(path, key) is not None:
        replace_file(path / FINGERPRINT_FILE, _stale_line(key))


def _stale_line(key: bytes) -> bytes:
    """Return a fingerprint of this user that fits no file."""
    line = _FORM.format(size=0, mtime_ns=0, digest="-")
    return f"{line} {_code(key, line)}\n".encode()


def assess(path: Path, in_use: bool) -> IndexState:
    """Return whether LMDB can safely open the index in a folder.

    `in_use` means that a writer lives: then the file may differ from its fingerprint but must not be shorter.
    """
    data = path / DATA_FILE
    try:
        st = os.stat(data)
    except OSError:
        return IndexState.INTACT
    if _is_marked_damaged(path):
        return IndexState.INTACT if in_use else IndexState.DAMAGED
    is_of_root = st.st_uid == 0 and os.geteuid() != 0
    try:
        recorded = _read_fingerprint(path, None if is_of_root else _user_secret())
    except (OSError, NoHomeError) as error:
        log.info("no fingerprint can be verified: %s", error)
        return _probed(path)
    if recorded is None:
        if st.st_size == 0:
            return IndexState.DAMAGED
        if is_of_root and not in_use:
            return _probed(path)
        # A writer that lives may not have written the first fingerprint yet.
        return IndexState.INTACT if in_use else IndexState.FOREIGN
    size, mtime_ns, digest = recorded
    if st.st_size < size:
        return IndexState.DAMAGED
    if (size, mtime_ns) == _state(st):
        try:
            # If another process changes the file meanwhile, size or mtime shows it and the probe decides.
            found = _digest(data, st)
        except OSError:
            return IndexState.DAMAGED
        if found == digest:
            return IndexState.INTACT
        if _is_content_digest(digest) and _state(os.stat(data)) == (size, mtime_ns):
            return IndexState.DAMAGED
    elif in_use:
        return IndexState.INTACT
    return _probed(path)


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


def _probed(path: Path) -> IndexState:
    """Read the whole index in a subprocess, where a crash does no harm; write a fingerprint if that works."""
    if not _survives_a_probe(path):
        return IndexState.DAMAGED
    write_fingerprint(path)
    return IndexState.INTACT


def _survives_a_probe(path: Path) -> bool:
    import subprocess

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
    except OSError as error:
        # This says nothing about the index, and what a rebuild cannot read would be lost.
        raise IndexUnusableError(
            f"cannot start a process that verifies the index {path}: {error.strerror}; if this user runs as "
            "many processes as are allowed (ulimit -u), end others or raise the limit"
        ) from error
    return done.returncode == 0


_PROBE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from casfs.index.fingerprint import read_whole_index
read_whole_index(Path(sys.argv[2]))
"""


def _user_secret() -> bytes:
    """Return the secret under which this user's fingerprints are authenticated; the first call creates it.

    Raise OSError, NoHomeError for a user without a home folder, and RefusedError where another user can
    change the user's state folder.
    """
    path = user_folder("XDG_STATE_HOME", ".local/state") / SECRET_FILE
    make_private_folder(path.parent, "XDG_STATE_HOME")
    if not path.exists():
        temporary = path.with_name(f".{SECRET_FILE}.{os.urandom(8).hex()}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(os.urandom(_SECRET_BYTES))
                file.flush()
                os.fsync(fd)
            # Of two processes that create it at once, both use the one that was linked first.
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink(missing_ok=True)
    with open(path, "rb") as file:
        secret = file.read(_SECRET_BYTES + 1)
    if len(secret) != _SECRET_BYTES:
        raise OSError(f"{path} does not have {_SECRET_BYTES} bytes; remove it")
    return secret


def _code(key: bytes, line: str) -> str:
    return blake3(line.encode(), key=key).hexdigest()


def _state(st: os.stat_result) -> tuple[int, int]:
    return st.st_size, st.st_mtime_ns


def _digest(path: Path, st: os.stat_result) -> str:
    """Return the digest of a file's content, or for a large file its inode and ctime."""
    if st.st_size > _HASHED_BYTES:
        return f"{st.st_ino}-{st.st_ctime_ns}"
    hasher = blake3()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(1 << 20):
            hasher.update(data)
    return hasher.hexdigest()


def _is_content_digest(digest: str) -> bool:
    return "-" not in digest


def _is_marked_damaged(path: Path) -> bool:
    try:
        with open(path / FINGERPRINT_FILE, "rb") as file:
            return file.read(_MAX_FINGERPRINT_BYTES) == _DAMAGED_MARK
    except OSError:
        return False


def _read_fingerprint(path: Path, key: bytes | None) -> tuple[int, int, str] | None:
    """Return size, mtime and digest of the fingerprint; with `key`, None unless its owner wrote it."""
    try:
        with open(path / FINGERPRINT_FILE, "rb") as file:
            text = file.read(_MAX_FINGERPRINT_BYTES).decode("ascii")
        line, _, code = text.removesuffix("\n").rpartition(" ")
        if key is not None and not codes_equal(code, _code(key, line)):
            return None
        size, mtime_ns, digest = line.removeprefix(_FORM.partition("{")[0]).split()
        return int(size), int(mtime_ns), digest
    except (OSError, ValueError):
        return None
