"""Write batches of entries for a restore, in a process of its own that `writer_process` starts.

The process holds no repository and no keys. It gets verified chunks, nodes, and descriptors of the target's
directories, and writes with the same `EntryWriter` as the restore itself. It ends at the end of its
connection, and before its next entry when the restore is stopped or has died.

A batch lies in one slot of the shared memory: its entries, and after them their chunks. A request names the
slot and is sent with the descriptors; a reply names it too, and has the results that are not plain successes.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Callable

import msgspec

from casfs.digest import Digest
from casfs.errors import IntegrityError, TreeError
from casfs.format.tree import Node
from casfs.restore.entry_writer import EntryResult, EntryWriter, WritingOptions
from casfs.trees.content import ContentReader

SLOTS = 3
"""Batches that a process has at a time: one that it writes, and two so that it never waits."""

SLOT_BYTES = 2 << 20
SLOTS_BEGIN = mmap.PAGESIZE
MEMORY_BYTES = SLOTS_BEGIN + SLOTS * SLOT_BYTES
"""The first byte of the memory is set to stop the process; the slots begin with the second page."""

MAX_DIRECTORIES = 128
"""Descriptors sent with a batch; the kernel passes on at most 253."""

REQUEST = struct.Struct("<II")
"""The slot, and the size of the batch's entries in bytes."""

REPLY = struct.Struct("<II")
"""The slot, and the size in bytes of the results that follow."""

MAX_OPTIONS_BYTES = 4096
STARTED = b"started"


class BatchEntry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """An entry to write. `directory` counts the batch's descriptors; `begin` is -1 without a chunk."""

    directory: int
    is_fresh: bool
    node: Node
    begin: int
    size: int


class EntryOutcome(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The fields of an `EntryResult` that a batch can have, and the entry's number in the batch."""

    entry: int
    written: bool
    unchanged: bool
    skipped: bool
    replaced_folder: bool
    lost: list[tuple[int, int]]
    metadata_errors: list[str]
    is_verified: bool | None
    damage: str | None
    error: tuple[int | None, str] | None

    @staticmethod
    def of(entry: int, result: EntryResult) -> EntryOutcome:
        """Return the outcome of an entry."""
        error = result.error
        return EntryOutcome(
            entry,
            result.written,
            result.unchanged,
            result.skipped,
            result.replaced_folder,
            result.lost,
            result.metadata_errors,
            result.is_verified,
            str(error) if isinstance(error, IntegrityError) else None,
            (error.errno, error.strerror or str(error)) if isinstance(error, OSError) else None,
        )

    def result(self, path: bytes, node: Node) -> EntryResult:
        """Return the result of the entry, which is at `path`."""
        result = EntryResult(
            path,
            node,
            self.written,
            self.unchanged,
            self.skipped,
            lost=self.lost,
            metadata_errors=self.metadata_errors,
            is_verified=self.is_verified,
            replaced_folder=self.replaced_folder,
        )
        if self.damage is not None:
            result.error = TreeError(self.damage)
        elif self.error is not None:
            result.error = OSError(*self.error)
        return result


_decoder = msgspec.msgpack.Decoder(list[BatchEntry])
_encoder = msgspec.msgpack.Encoder()


def serve(connection: socket.socket) -> None:
    """Take the options and the memory, then write the batches that arrive, until the connection ends."""
    data, (memory_fd,), _, _ = socket.recv_fds(connection, MAX_OPTIONS_BYTES, 1)
    options = msgspec.msgpack.decode(data, type=WritingOptions)
    if options.has_keyed_digests:
        # What is encrypted in the repository passes through this process.
        from casfs.crypto.process_protection import forbid_inspection

        forbid_inspection()
    with mmap.mmap(memory_fd, MEMORY_BYTES) as memory:
        server = _Server(memory, options)
        connection.sendall(STARTED)
        while True:
            request, fds, _, _ = socket.recv_fds(connection, REQUEST.size, MAX_DIRECTORIES)
            try:
                if len(request) < REQUEST.size:
                    return
                slot, entries_bytes = REQUEST.unpack(request)
                outcomes = server.write_batch(slot, entries_bytes, fds)
            finally:
                for fd in fds:
                    os.close(fd)
            if outcomes is None:
                return
            reply = _encoder.encode(outcomes) if outcomes else b""
            connection.sendall(REPLY.pack(slot, len(reply)) + reply)


class _Server:
    """Writes batches from the slots of one memory, as long as the process that started this one lives."""

    def __init__(self, memory: mmap.mmap, options: WritingOptions) -> None:
        self._memory = memory
        self._parent = os.getppid()
        self._writer = EntryWriter(options, _extents)

    def write_batch(
        self, slot: int, entries_bytes: int, fds: list[int]
    ) -> list[EntryOutcome] | None:
        """Write a batch; return the outcomes that are not plain successes, or None when stopped."""
        base = SLOTS_BEGIN + slot * SLOT_BYTES
        outcomes = []
        for number, entry in enumerate(_decoder.decode(self._memory[base : base + entries_bytes])):
            if self._memory[0] or os.getppid() != self._parent:
                return None
            chunk = b""
            if entry.begin >= 0:
                chunk = self._memory[base + entry.begin : base + entry.begin + entry.size]
            read = _returning(chunk)
            fd = fds[entry.directory]
            result = self._writer.write(fd, b"", entry.node, read, is_fresh=entry.is_fresh)
            if not result.is_plain:
                outcomes.append(EntryOutcome.of(number, result))
        return outcomes


def _returning(chunk: bytes) -> Callable[[Digest], bytes]:
    return lambda _: chunk


def _extents(node: Node) -> ContentReader:
    """Return the reader of a file of at most one chunk, which has no lists."""
    return ContentReader(node.content, node.levels, _no_list)


def _no_list(digest: Digest) -> bytes:
    raise TreeError(f"the content list {digest.hex()} is not in the batch")
