"""The encrypted files cache of a write-only host, which cannot read its previous snapshot.

The cache lies beside the index. It maps each file to its node; the name and the encryption key of an entry
are derived from the path and the metadata of the file. Finding and decrypting an entry takes the secret of
the deduplication domain and the unchanged file; about deleted or changed files the cache reveals only that
they existed, and of large ones the size class: what is encrypted is padded (FORMAT.md, "Encryption").

The entries of a backup are trusted only after all data of that backup was durable and indexed. One thread
uses the cache, a second one encrypts and writes. Without the cache, a backup reads every file again.
"""

from __future__ import annotations

import os
import secrets
import struct
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from casfs.digest import Digest
from casfs.format.snapshot import padded_size
from casfs.format.tree import Node, NodeType
from casfs.index.index import Index
from casfs.index.lmdb_env import Transaction
from casfs.trees.content import EXTENT, HOLE

_STAT = struct.Struct("<QQqqQ")
_HEAD = struct.Struct("<8sI")
_CONFIRMED = struct.Struct("<QQ")
_PADDED = b"\xc1"
"""The first byte of a padded node; no msgpack value begins with it. An older version did not pad."""

_LENGTH = struct.Struct("<I")
_LEAST_BYTES = 256
"""A node of a small file takes less as a rule, so all of these have the same size."""

_NONCE_BYTES = 12
_DAY_S = 86_400
_KEPT_DAYS = 60
_REFRESHED_DAYS = 7
_BATCH = 20_000
"""Entries per commit: a commit writes every page that it touches, and names are spread over all pages."""
_SCAN_BATCH = 10_000

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Node)


class FileCache:
    """The files cache for one backup.

    `key` is the domain's `file_cache_key`. `losses` is the loss epoch of the index, read before
    this backup counted the first blob as stored. `earlier_keys` are those of the domains that this machine
    used before, in which it looks up what it does not find.
    """

    def __init__(
        self, index: Index, key: bytes, losses: int, earlier_keys: Sequence[bytes] = ()
    ) -> None:
        self._index = index
        self._env = index.environment
        self._files = self._env.database(b"files")
        self._meta = self._env.database(b"meta")
        self._key = key
        self._earlier_keys = tuple(earlier_keys)
        self._state = losses, index.removals()
        self._day = int(time.time()) // _DAY_S
        self._batch = secrets.token_bytes(8)
        self._pending: list[tuple[bytes, Node]] = []
        self._writer = ThreadPoolExecutor(1, "casfs-file-cache")
        self._writing: Future[None] | None = None
        self._is_empty = not self._env.read(lambda txn: txn.stat(db=self._files)["entries"])
        self._trusts_all = not index.untrusted_packs()
        self._confirmed: dict[bytes, tuple[int, int]] = {}

    def get(self, path: bytes, st: os.stat_result) -> Node | None:
        """Return the node stored for a file with this path and this metadata, or None."""
        if self._is_empty:
            return None
        found = self._find(self._key, path, st)
        is_earlier = found is None
        for key in self._earlier_keys if is_earlier else ():
            found = found or self._find(key, path, st)
        if found is None:
            return None
        node, day = found
        if is_earlier or self._day - day >= _REFRESHED_DAYS:
            self.put(path, node)
        return node

    def _find(self, domain_key: bytes, path: bytes, st: os.stat_result) -> tuple[Node, int] | None:
        """Return the node of a file and the day of its entry, None without a trusted entry of a domain."""
        metadata = (st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)
        name, key = derive_entry(domain_key, path, *metadata)
        value = self._env.read(lambda txn: txn.get(name, db=self._files))
        if value is None or len(value) < _HEAD.size + _NONCE_BYTES:
            return None
        batch, day = _HEAD.unpack_from(value)
        nonce = value[_HEAD.size : _HEAD.size + _NONCE_BYTES]
        try:
            plain = AESGCM(key).decrypt(nonce, value[_HEAD.size + _NONCE_BYTES :], None)
            node = _decoder.decode(_without_padding(plain))
        except (InvalidTag, msgspec.DecodeError, ValueError):
            return None
        if node.name != path.rpartition(b"/")[2] or not self._is_stored(batch, node):
            return None
        return node, day

    def put(self, path: bytes, node: Node) -> None:
        """Add the node of a file, unless the next backup must not trust it as unchanged."""
        if node.kind != NodeType.FILE or node.state or node.racy:
            return
        self._pending.append((path, node))
        if len(self._pending) >= _BATCH:
            self._submit()

    def commit(self) -> None:
        """Mark the entries of this backup as trusted, and drop old entries.

        Call it after all blobs of the backup are durable and indexed.
        """
        self._write()
        key, value = b"memory" + self._batch, _CONFIRMED.pack(*self._state)
        self._env.write(lambda txn: txn.put(key, value, db=self._meta))
        self._drop_old()

    def close(self) -> None:
        """Wait for pending writes; entries without a commit stay untrusted."""
        self._writer.shutdown()

    def _is_stored(self, batch: bytes, node: Node) -> bool:
        if self._trusts_all and self._state_at(batch) == self._state:
            return True  # no blob was lost or removed since that backup
        if node.levels:
            return False  # the content lists are in packs that this host cannot decrypt
        digests = (
            Digest(digest) for _, digest in EXTENT.iter_unpack(node.content) if digest != HOLE
        )
        return all(self._index.are_stored(digests))

    def _state_at(self, batch: bytes) -> tuple[int, int]:
        """Return the loss and removal counts of the index at a backup; (-1, -1) without its commit."""
        found = self._confirmed.get(batch)
        if found is None:
            value = self._env.read(lambda txn: txn.get(b"memory" + batch, db=self._meta))
            found = (-1, -1)
            if value is not None:
                losses, removals = _CONFIRMED.unpack(value)
                found = losses, removals
            self._confirmed[batch] = found
        return found

    def _write(self) -> None:
        """Write all pending entries, and wait until they are written."""
        self._submit()
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _submit(self) -> None:
        if self._writing is not None:
            self._writing.result()
        files, self._pending = self._pending, []
        self._writing = self._writer.submit(self._write_files, files) if files else None

    def _write_files(self, files: list[tuple[bytes, Node]]) -> None:
        """Encrypt and write entries, on the writer's thread."""
        head = _HEAD.pack(self._batch, self._day)
        rows = []
        for path, node in files:
            metadata = (node.inode, node.size, node.mtime_ns, node.ctime_ns)
            name, key = derive_entry(self._key, path, *metadata)
            nonce = os.urandom(_NONCE_BYTES)
            stored = AESGCM(key).encrypt(nonce, _padded(_encoder.encode(node)), None)
            rows.append((name, head + nonce + stored))
        rows.sort()

        def change(txn: Transaction) -> None:
            for name, value in rows:
                txn.put(name, value, db=self._files)

        self._env.write(change)

    def _drop_old(self) -> None:
        """Drop the entries that no backup used for two months. Does so at most once a day."""
        today = struct.pack("<I", self._day)
        if self._env.read(lambda txn: txn.get(b"tidied", db=self._meta)) == today:
            return
        after: bytes | None = b""
        while after is not None:
            after = self._drop_some(after)
        self._env.write(lambda txn: txn.put(b"tidied", today, db=self._meta))

    def _drop_some(self, after: bytes) -> bytes | None:
        """Drop old entries in one batch after `after`; return its last name, None at the end."""
        limit = self._day - _KEPT_DAYS

        def scan(txn: Transaction) -> tuple[list[bytes], bytes | None]:
            cursor = txn.cursor(db=self._files)
            old: list[bytes] = []
            more = cursor.set_range(after) if after else cursor.first()
            for _ in range(_SCAN_BATCH):
                if not more:
                    return old, None
                if _HEAD.unpack_from(cursor.value())[1] < limit:
                    old.append(bytes(cursor.key()))
                more = cursor.next()
            return old, bytes(cursor.key()) if more else None

        old, last = self._env.read(scan)

        def change(txn: Transaction) -> None:
            for name in old:
                txn.delete(name, db=self._files)

        if old:
            self._env.write(change)
        return last


def _padded(node: bytes) -> bytes:
    """Return an encoded node, padded so that its size shows little of its name and its content."""
    data = _PADDED + _LENGTH.pack(len(node)) + node
    return data.ljust(padded_size(max(len(data), _LEAST_BYTES)), b"\0")


def _without_padding(plain: bytes) -> bytes:
    """Return the encoded node; raise ValueError."""
    if not plain.startswith(_PADDED):
        return plain
    begin = len(_PADDED) + _LENGTH.size
    if len(plain) < begin:
        raise ValueError("a padded node is too short")
    (size,) = _LENGTH.unpack_from(plain, len(_PADDED))
    return plain[begin : begin + size]


def derive_entry(
    domain_key: bytes, path: bytes, inode: int, size: int, mtime_ns: int, ctime_ns: int
) -> tuple[bytes, bytes]:
    """Return the name of a file's entry and the key of its value."""
    material = _STAT.pack(inode, size, mtime_ns, ctime_ns, len(path)) + path
    derived = blake3(material, key=domain_key).digest(length=64)
    return derived[:32], derived[32:]
