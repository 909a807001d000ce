"""Names that the target takes for one: in another case, or in another Unicode normalization."""

from __future__ import annotations

import fcntl
import os
import sys
import unicodedata

from casfs.restore.target_fs import create_file, entry_stat, unlink_quietly
from casfs.restore.temporary_entries import temporary_name

_FS_IOC_GETFLAGS = 0x80086601
_FS_CASEFOLD_FL = 0x40000000


def merges_names(fd: int, known: dict[int, bool]) -> bool:
    """Return whether a directory treats names that differ in case or normalization as one name.

    `known` caches the answer for each device during one restore.
    """
    if _has_casefold_flag(fd):
        return True
    device = os.fstat(fd).st_dev
    found = known.get(device)
    if found is None:
        found = known[device] = _probe_merging(fd)
    return found


def _has_casefold_flag(fd: int) -> bool:
    flags = bytearray(8)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
    except OSError:
        return False
    return bool(int.from_bytes(flags[:4], sys.byteorder) & _FS_CASEFOLD_FL)


def _probe_merging(fd: int) -> bool:
    plain = temporary_name()
    for name in (plain + "-é".encode(), plain):
        try:
            os.close(create_file(fd, name))
        except OSError:
            continue  # a file system that refuses some bytes, or a directory without write permission
        try:
            text = name.decode()
            others = {text.upper(), unicodedata.normalize("NFD", text)} - {text}
            return any(entry_stat(fd, other.encode()) is not None for other in others)
        finally:
            unlink_quietly(fd, name)
    return False


def fold_name(name: bytes) -> str:
    """Return a key that is equal for all names that some file system may treat as one name.

    The key ignores case, normalization, and dots and spaces at the end. A particular file system may still
    distinguish names with equal keys.
    """
    text = unicodedata.normalize("NFD", name.decode("utf-8", "surrogateescape"))
    return unicodedata.normalize("NFD", text.casefold()).rstrip(" .")
