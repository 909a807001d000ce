"""Blob stores made for tests: in memory, or in a folder with a storage and an index."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

import casfs
from casfs.digest import Digest, PackId, digest_of
from casfs.errors import BlobError
from casfs.format.codec import BlobCodec, BlobKind
from casfs.format.pack import (
    PACK_PREFIXES,
    PackEntry,
    PackRef,
    encode_end,
    encode_header,
    encode_record_header,
)
from casfs.index.index import Index
from casfs.storage.local import LocalStorage
from casfs.store.blob_store import BlobStore, pack_name, parse_pack_name
from casfs.store.layout import FORMAT_1, PackLayout
from casfs.store.pack_builder import PACK_BYTES
from casfs.store.writer import BlobWriter, WriteStats

PROJECT = Path(casfs.__file__).parent.parent


def noise(label: str, size: int) -> bytes:
    """Return bytes that do not compress, the same ones every time for the same label."""
    return blake3(label.encode()).digest(length=size) if size else b""


class MemoryBlobs:
    """Blobs in a dict; `kinds` counts the different ones that were put of each kind."""

    def __init__(self) -> None:
        self.blobs: dict[Digest, bytes] = {}
        self.kinds: Counter[BlobKind] = Counter()
        self.reads: list[Digest] = []

    def put(self, kind: BlobKind, digest: Digest, data: bytes) -> None:
        if digest not in self.blobs:
            self.kinds[kind] += 1
        self.blobs[digest] = data

    def keep(self, data: bytes) -> Digest:
        """Store a blob as it is and return its digest."""
        digest = digest_of(data)
        self.blobs[digest] = data
        return digest

    def read(self, digest: Digest) -> bytes:
        self.reads.append(digest)
        if digest not in self.blobs:
            raise BlobError(digest, "it is missing: no pack holds it")
        return self.blobs[digest]


@contextmanager
def open_store(
    root: Path, sync: bool = False, on_step: Callable[[str], None] | None = None
) -> Iterator[BlobStore]:
    """Open a store in a folder, which is made when it is not there."""
    for folder in ("packs", "tmp"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    storage = LocalStorage(root, writer=f"test{os.getpid()}", sync=sync, on_step=on_step)
    index = Index(root / "index")
    try:
        store = BlobStore(storage, index, BlobCodec(3))
        store.reconcile()
        yield store
    finally:
        index.close()
        storage.close()


def store_blobs(
    store: BlobStore,
    plains: Iterable[bytes],
    kind: BlobKind = BlobKind.DATA,
    pack_bytes: int = PACK_BYTES,
    layout: PackLayout = FORMAT_1,
) -> WriteStats:
    """Store blobs to the end, durably and in the index."""
    writer = BlobWriter(store, pack_bytes=pack_bytes, layout=layout)
    try:
        for plain in plains:
            writer.put(kind, digest_of(plain), plain)
        return writer.finish()
    finally:
        writer.close()


def pack_paths(root: Path) -> list[Path]:
    """Return the paths of all packs of a store or repository, sorted by their names."""
    folders = (root / prefix for prefix in PACK_PREFIXES)
    return sorted(
        (path for folder in folders for path in folder.rglob("*") if path.is_file()),
        key=lambda path: path.name,
    )


def data_pack_paths(root: Path) -> list[Path]:
    """Return the paths of the data packs of a store or repository, sorted by their names."""
    return [path for path in pack_paths(root) if not pack_ref(path).is_meta]


def pack_ref(path: Path) -> PackRef:
    """Return the pack that a file in a store's folder holds."""
    pack = parse_pack_name("/".join(path.parts[-3:]))
    assert pack is not None
    return pack


def make_pack(plains: Iterable[bytes]) -> tuple[bytes, list[PackEntry]]:
    """Return the bytes of a pack of raw blobs, and its entries."""
    data = bytearray(encode_header())
    entries = []
    for plain in plains:
        data += encode_record_header(BlobKind.DATA, 0, len(plain), len(plain))
        digest = digest_of(plain)
        entries.append(PackEntry(digest, len(data), len(plain), len(plain), BlobKind.DATA, 0))
        data += plain
    return bytes(data) + encode_end(entries, len(data)), entries


def add_pack(root: Path, data: bytes, is_meta: bool = False) -> PackRef:
    """Put the bytes of a pack into a store's folder behind its back; return the pack."""
    pack = PackRef(PackId(digest_of(data)), is_meta)
    path = root / pack_name(pack)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return pack


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file; an offset below zero counts from its end."""
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@contextmanager
def child(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run a Python program beside the test; it is killed at the end of the block if it still runs.

    Program and test talk through its standard streams, a line at a time, so that neither sleeps.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def read_line(process: subprocess.Popen[str]) -> str:
    """Return the next line that a child prints, or "" when it has ended."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def write_line(process: subprocess.Popen[str], line: str = "go") -> None:
    """Write a line to the standard input of a child."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
