"""Bytes and values of the SFTP protocol, version 3, without input or output.

The protocol is that of draft-ietf-secsh-filexfer-02, with the extensions of OpenSSH (its file PROTOCOL).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from casfs.storage.base import Data

PROTOCOL_VERSION = 3

READ, WRITE, CREATE, EXCLUSIVE = 0x01, 0x02, 0x08, 0x20
"""How a file is opened."""

_SIZE, _OWNERS, _PERMISSIONS, _TIMES, _EXTENDED = 0x01, 0x02, 0x04, 0x08, 0x80000000
"""Which attributes follow."""

NO_ATTRIBUTES = struct.pack(">I", 0)
FILE_MODE = struct.pack(">II", _PERMISSIONS, 0o600)
FOLDER_MODE = struct.pack(">II", _PERMISSIONS, 0o700)

HARDLINK = "hardlink@openssh.com"
POSIX_RENAME = "posix-rename@openssh.com"
FSYNC = "fsync@openssh.com"
LIMITS = "limits@openssh.com"
STATVFS = "statvfs@openssh.com"


class Request(IntEnum):
    """The requests that are used here."""

    INIT = 1
    OPEN = 3
    CLOSE = 4
    READ = 5
    WRITE = 6
    FSTAT = 8
    OPENDIR = 11
    READDIR = 12
    REMOVE = 13
    MKDIR = 14
    STAT = 17
    RENAME = 18
    EXTENDED = 200


class Reply(IntEnum):
    """The kinds of answers."""

    VERSION = 2
    STATUS = 101
    HANDLE = 102
    DATA = 103
    NAME = 104
    ATTRS = 105
    EXTENDED_REPLY = 201


class Status(IntEnum):
    """The codes of a STATUS answer that mean something here."""

    OK = 0
    EOF = 1
    NO_SUCH_FILE = 2
    PERMISSION_DENIED = 3
    FAILURE = 4
    OP_UNSUPPORTED = 8


class StatusError(Exception):
    """The server answered a request with a status other than OK."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message


def pack_string(data: Data | str) -> bytes:
    """Return a string of the protocol: its length, then its bytes."""
    raw = data.encode() if isinstance(data, str) else bytes(data)
    return struct.pack(">I", len(raw)) + raw


class Reader:
    """Takes the fields of an answer one after another; raises ValueError where it is too short."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def u32(self) -> int:
        """Return the next number of 32 bits."""
        return int.from_bytes(self._take(4))

    def u64(self) -> int:
        """Return the next number of 64 bits."""
        return int.from_bytes(self._take(8))

    def string(self) -> bytes:
        """Return the next string."""
        return self._take(self.u32())

    @property
    def is_at_end(self) -> bool:
        """Whether nothing is left."""
        return self._at >= len(self._data)

    def _take(self, size: int) -> bytes:
        data = self._data[self._at : self._at + size]
        if len(data) != size:
            raise ValueError("the answer is too short")
        self._at += size
        return data


@dataclass(frozen=True, slots=True)
class Attributes:
    """The attributes of a file that the server sent; None for each that it left out."""

    size: int | None
    mode: int | None
    mtime_s: int | None


Entries = list[tuple[str, Attributes]]


def parse_attributes(fields: Reader) -> Attributes:
    """Return the attributes that come next in an answer; raise ValueError where it is too short."""
    flags = fields.u32()
    size = fields.u64() if flags & _SIZE else None
    if flags & _OWNERS:
        fields.u64()  # owner and group
    mode = fields.u32() if flags & _PERMISSIONS else None
    mtime_s = None
    if flags & _TIMES:
        fields.u32()  # the time of the last access
        mtime_s = fields.u32()
    if flags & _EXTENDED:
        for _ in range(fields.u32()):
            fields.string()
            fields.string()
    return Attributes(size, mode, mtime_s)


def parse_names(reply: bytes) -> Entries:
    """Return the entries of a NAME answer, but for `.` and `..`; raise ValueError where it is too short."""
    fields = Reader(reply)
    found = []
    for _ in range(fields.u32()):
        name = fields.string().decode("ascii", errors="replace")
        fields.string()  # a line as `ls -l` prints it
        attributes = parse_attributes(fields)
        if name not in (".", ".."):
            found.append((name, attributes))
    return found
