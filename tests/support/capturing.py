"""Backing up in this process, and looking at all that a backup left: nodes, problems, files, blobs."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3
from casfs_mount.background import BackgroundPool
from casfs_mount.blob_reader import BlobReader
from casfs_mount.chunk_cache import ChunkCache
from casfs_mount.event_loop_guard import EventLoopGuard
from casfs_mount.tree_cache import TreeCache
from casfs_mount.view import MountContext, SnapshotView
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from casfs.backup.run import BackupOptions, BackupResult, run_backup
from casfs.cli.backup_report import exit_code
from casfs.format.codec import Codec
from casfs.format.key_derivation import SessionId
from casfs.format.tree import Node, NodeType
from casfs.index.schema import Location
from casfs.maintenance.check import Checker
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import Problem, RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_writing
from casfs.repository.repository import Repository
from casfs.restore.restorer import RestoreOptions, Restorer
from casfs.store.blob_store import pack_name
from tests.support.encryption import RECIPIENT, unlock


@dataclass(frozen=True, slots=True)
class PublishedBackup:
    """A published snapshot, with the problems that its backup reported."""

    repository: Repository
    result: BackupResult
    problems: list[Problem]

    @property
    def exit(self) -> int:
        return exit_code(self.result, changed_ok=False)

    @property
    def flagged(self) -> int:
        assert self.result.snapshot.root.tree is not None
        return self.result.snapshot.root.tree.flagged

    def node(self, path: Path) -> Node | None:
        """Look up the entry of a source in the snapshot."""
        root = self.result.snapshot.root
        return self.repository.trees.resolve(root, os.fsencode(path).lstrip(b"/"))

    def file(self, path: Path) -> Node:
        node = self.node(path)
        assert node is not None
        return node

    def problem(self, path: Path) -> Problem | None:
        """Return the only problem of a source, or None."""
        reported = [
            problem
            for problem in self.problems
            if problem.path.strip(b"/") == os.fsencode(path).strip(b"/")
        ]
        assert len(reported) <= 1, reported
        return reported[0] if reported else None

    def shown(self, path: Path) -> tuple[bytes, dict[str, str]] | None:
        """Return the bytes and the casfs attributes of a regular file as a mount shows them."""
        snapshot_id, snapshot = self.result.snapshot_id, self.result.snapshot
        assert snapshot_id is not None
        guard, background = EventLoopGuard(), BackgroundPool()
        blobs = BlobReader(self.repository.store, guard)
        context = MountContext(
            repository=self.repository,
            blobs=blobs,
            tree_cache=TreeCache(blobs.read),
            chunk_cache=ChunkCache(blobs.read, guard, background),
            guard=guard,
            background=background,
        )
        view = SnapshotView(context, snapshot_id, snapshot, snapshot.root, 1)
        number, node = 1, snapshot.root
        for name in os.fsencode(path).strip(b"/").split(b"/"):
            found = view.lookup(number, name)
            if found is None:
                return None
            number, node = found
        if node.kind != NodeType.FILE:
            return None
        reader = view.open(number)
        data = b""
        while part := b"".join(reader.read(len(data), 1 << 20)):
            data += part
        known = {}
        for word in ("capture", "captured", "observed", "reason", "attempts"):
            value = view.xattr(number, b"user.casfs." + word.encode())
            if value is not None:
                known[word] = value.decode()
        return data, known

    def restore(self, target: Path) -> Path:
        """Restore everything and return where the root of the file system is then."""
        root = self.result.snapshot.root
        restorer = Restorer(self.repository, RestoreOptions(verify=True), RecordingMonitor())
        result = restorer.restore(b"", root, os.fsencode(target), False)
        assert (result.damaged, result.failed) == (0, 0)
        return target


class BackupFixture:
    """A repository of one test."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository

    def back_up(self, *paths: Path, **options: Any) -> PublishedBackup:
        monitor = RecordingMonitor()
        context = tuple(os.fsencode(path) for path in paths)
        result = run_backup(self.repository, BackupOptions(context, **options), monitor)
        return PublishedBackup(self.repository, result, monitor.problems)

    def assert_is_intact(self) -> None:
        """Require that a full check finds nothing, and that every index entry is correct.

        The entries are compared with the packs' own bytes, without the code that reads blobs.
        """
        result = Checker(self.repository, RecordingMonitor()).check(PackSelection())
        assert result.damage == []
        store = self.repository.store
        found = 0
        for digest, place in store.index.blobs():
            name = pack_name(store.index.pack_ref(place.pack))
            payload = bytes(store.storage.read(name, place.offset, place.stored_bytes))
            assert len(payload) == place.stored_bytes
            codec, whole = place.codec, blake3()
            if self.repository.key_manager is not None:
                codec, payload, key = self._decrypted(name, place, payload)
                whole = blake3(key=key)
            plain = zstandard.decompress(payload) if codec else payload
            if codec == Codec.GROUP:
                (count,) = struct.unpack_from("<I", plain)
                sizes = struct.unpack_from(f"<{count}I", plain, 4)
                begin = 4 + 4 * count + sum(sizes[: place.position])
                plain = plain[begin : begin + sizes[place.position]]
            assert len(plain) == place.plain_bytes
            assert whole.update(plain).digest() == digest, f"poisoned: {digest.hex()}"
            found += 1
        assert found > 0

    def _decrypted(self, name: str, place: Location, stored: bytes) -> tuple[int, bytes, bytes]:
        """Return codec, payload and key of the digest, by the words of the document."""
        assert self.repository.key_manager is not None
        head = self.repository.store.storage.read(name, 0, 80)
        session = self.repository.key_manager.keyring.session(SessionId(head[16:48]))
        key = blake3(
            session.secret + head[48:80], derive_key_context="casfs 2026-11-23 pack key"
        ).digest()
        record = b"cBLB" + bytes([254, 16, 0, 0]) + len(stored).to_bytes(4, "little") + bytes(4)
        plain = AESGCM(key).decrypt(place.offset.to_bytes(12, "little"), stored, record)
        kind, codec, domain, plain_bytes = struct.unpack("<BBHI", plain[:8])
        assert (kind, codec | 16) == (place.kind, place.codec)
        assert codec == Codec.GROUP or plain_bytes == place.plain_bytes
        return codec, plain[8:], session.domains[domain].digest_key


@contextmanager
def open_backup_fixture(folder: Path, encrypted: bool = False) -> Iterator[BackupFixture]:
    """Make a repository and open it for backups."""
    create_repository(folder, (RECIPIENT,) if encrypted else ())
    with open_for_writing(folder, "test", OpenOptions(unlock=unlock, sync=False)) as repository:
        yield BackupFixture(repository)
