"""The format document suffices to write a reader, of frozen repositories and of new ones."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyrage
import pytest
import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.support.builders import RepositoryFixture
from tests.support.encryption import SECRET, EncryptedRepositoryFixture
from tests.support.stores import noise, pack_paths

DATA = Path(__file__).parents[2] / "data"
FROZEN = [DATA / f"repository-v{number}" for number in (1, 2)]


class Reader:
    """A reader that was written with the document and without the code."""

    HEADER_BYTES = 16
    OUTER_CODEC = 0

    def __init__(self, root: Path) -> None:
        self.root = root
        self.groups = 0
        self.blobs = {
            digest: data for path in sorted(pack_paths(root)) for digest, data in self.pack(path)
        }

    @staticmethod
    def plain(codec: int, payload: bytes, size: int) -> bytes:
        data = zstandard.ZstdDecompressor().decompress(payload) if codec else payload
        assert codec in (0, 1, 2) and len(data) == size
        return data

    def pack(self, path: Path) -> Iterator[tuple[bytes, bytes]]:
        data = path.read_bytes()
        assert blake3(data).hexdigest() == path.name
        assert struct.unpack("<8sHHI", data[:16]) == (b"CASFSPAK", 1, self.HEADER_BYTES, 0)
        at, size, count, digest = struct.unpack("<QII32s", data[-64:-16])
        assert data[-8:] == b"CASFSEND"
        assert blake3(data[at : at + size]).digest() == digest
        kind, codec, _, directory = self.record(data, at)
        assert (kind, codec) == (255, 0)
        entries = list(struct.iter_unpack("<32sIIBBH", directory))
        assert len(entries) == count
        begin = at - sum(16 + entry[1] for entry in entries if not entry[5])
        assert begin == self.HEADER_BYTES + 16
        blobs: list[bytes] = []
        domain = 0
        for digest, stored, plain_bytes, *kinds, position in entries:
            if not position:
                assert not blobs
                kind, codec, domain, plain = self.record(data, begin)
                assert kinds == [kind, codec + self.OUTER_CODEC]
                blobs = self.separate(plain, codec)
                begin += 16 + stored
            found = blobs.pop(0)
            assert len(found) == plain_bytes
            assert self.digest(found, data, domain) == digest
            yield digest, found
        assert begin == at and not blobs

    def record(self, pack: bytes, begin: int) -> tuple[int, int, int, bytes]:
        """Return kind, codec, domain and plaintext of the record whose payload begins there."""
        magic, kind, codec, zero, size, plain_bytes = struct.unpack(
            "<4sBBHII", pack[begin - 16 : begin]
        )
        assert (magic, zero) == (b"cBLB", 0)
        return kind, codec, 0, self.plain(codec, pack[begin : begin + size], plain_bytes)

    def digest(self, blob: bytes, pack: bytes, domain: int) -> bytes:
        return blake3(blob).digest()

    def separate(self, plain: bytes, codec: int) -> list[bytes]:
        """Return the blobs in the plaintext of a record."""
        if codec != 2:
            return [plain]
        self.groups += 1
        (count,) = struct.unpack("<I", plain[:4])
        rest, blobs = plain[4 + 4 * count :], []
        for size in struct.unpack(f"<{count}I", plain[4 : 4 + 4 * count]):
            blobs.append(rest[:size])
            rest = rest[size:]
        assert not rest
        return blobs

    def snapshots(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for path in self.root.glob("snapshots/*"):
            data = path.read_bytes()
            assert blake3(data).hexdigest() == path.name
            magic, version, codec, _, size = struct.unpack("<8sHBBI", data[:16])
            assert (magic, version) == (b"CASFSNAP", 1)
            yield path.name, msgspec.msgpack.decode(self.plain(codec, data[16:], size))

    def entries(self, reference: list[Any]) -> Iterator[list[Any]]:
        form, parts = msgspec.msgpack.decode(self.blobs[reference[0]])
        for part in parts:
            if form == 0:
                yield part
            else:
                yield from self.entries(part[1])

    def walk(self, node: list[Any], path: bytes = b"") -> Iterator[tuple[bytes, list[Any]]]:
        for entry in self.entries(node[15]):
            below = path + b"/" + entry[0] if path else entry[0]
            yield below, entry
            if entry[1] == 2:
                yield from self.walk(entry, below)

    def content(self, records: bytes, levels: int) -> bytes:
        found = b""
        for length, digest in struct.iter_unpack("<Q32s", records):
            if levels:
                part = self.content(self.blobs[digest], levels - 1)
            else:
                part = bytes(length) if digest == bytes(32) else self.blobs[digest]
            assert len(part) == length
            found += part
        return found


class EncryptedReader(Reader):
    """The same for an encrypted repository, with an identity."""

    HEADER_BYTES = 80
    OUTER_CODEC = 16

    def __init__(self, root: Path, secret: str) -> None:
        identity = pyrage.x25519.Identity.from_str(secret)
        self.sessions: dict[bytes, dict[str, Any]] = {}
        for path in root.glob("sessions/*/*.age"):
            session = json.loads(pyrage.decrypt(path.read_bytes(), [identity]))
            assert session["id"] == path.parent.name
            self.sessions[bytes.fromhex(session["id"])] = session
        super().__init__(root)

    @staticmethod
    def derive(context: str, material: bytes) -> bytes:
        return blake3(material, derive_key_context=f"casfs 2026-11-23 {context}").digest()

    def cipher(self, context: str, session: bytes, salt: bytes) -> AESGCM:
        secret = bytes.fromhex(self.sessions[session]["secret"])
        return AESGCM(self.derive(context, secret + salt))

    def record(self, pack: bytes, begin: int) -> tuple[int, int, int, bytes]:
        header = pack[begin - 16 : begin]
        magic, kind, codec, zero, size, plain_bytes = struct.unpack("<4sBBHII", header)
        assert (magic, codec, zero, plain_bytes) == (b"cBLB", 16, 0, 0)
        plain = self.cipher("pack key", pack[16:48], pack[48:80]).decrypt(
            begin.to_bytes(12, "little"), pack[begin : begin + size], header
        )
        if kind == 255:
            return kind, 0, 0, plain
        assert kind == 254
        kind, codec, domain, plain_bytes = struct.unpack("<BBHI", plain[:8])
        return kind, codec, domain, self.plain(codec, plain[8:], plain_bytes)

    def digest(self, blob: bytes, pack: bytes, domain: int) -> bytes:
        secret = bytes.fromhex(self.sessions[pack[16:48]]["domains"][domain])
        return blake3(blob, key=self.derive("digest key", secret)).digest()

    def snapshots(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for path in self.root.glob("snapshots/*"):
            data = path.read_bytes()
            assert blake3(data).hexdigest() == path.name
            magic, version, codec, _, size = struct.unpack("<8sHBBI", data[:16])
            assert (magic, version, codec, size) == (b"CASFSNAP", 2, 16, 0)
            cipher = self.cipher("snapshot key", data[16:48], data[48:80])
            plain = cipher.decrypt(bytes(12), data[104:], data[:104])[192:]
            codec, size = struct.unpack("<B3xI", plain[:8])
            yield path.name, msgspec.msgpack.decode(self.plain(codec, plain[8:], size))


@pytest.mark.parametrize("frozen", FROZEN, ids=lambda path: path.name)
@pytest.mark.parametrize("part", ["names", "contents"])
def test_a_reader_written_from_the_document_reads_the_frozen_repository(
    part: str, frozen: Path
) -> None:
    manifest = json.loads(frozen.with_suffix(".json").read_text())
    reader = Reader(frozen)
    seen = set()
    for name, found in reader.snapshots():
        entries = dict(reader.walk(found["root"]))
        seen.add(name)
        reported = {base64.b64decode(path): what for path, what in manifest[name].items()}
        assert entries.keys() >= reported.keys()
        if part == "names":
            summary = found["root"][15]
            assert summary[1] == len(entries)
            if frozen.name == "repository-v2":
                noted = [entry for entry in entries.values() if entry[16] and entry[16][0]]
                assert summary[4] == len(noted)
            else:
                assert entries.keys() == reported.keys()
                assert len(summary) == 4
            continue
        for path, entry in entries.items():
            if entry[1] == 1:
                data = reader.content(entry[12], entry[13])
                assert len(data) == entry[9]
                if path in reported:
                    assert blake3(data).hexdigest() == reported[path]["blake3"]
                assert entry[14] in (None, blake3(data).digest())
    assert seen == set(manifest)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a folder of small files that compress, of small ones that do not, and of a large one."""
    folder = tmp_path / "source"
    (folder / "below").mkdir(parents=True)
    for number in range(40):
        (folder / "below" / f"text {number}").write_bytes(b"the text of file %d\n" % number * 90)
    for number in range(3):
        (folder / f"noise {number}").write_bytes(noise(f"{number}", 5000))
    (folder / "large").write_bytes(b"".join(b"line %d\n" % number for number in range(300_000)))
    (folder / "empty").touch()
    return folder


def require_source(reader: Reader, source: Path) -> None:
    """Require that the only snapshot shows a source, and that its small files are in groups."""
    assert reader.groups
    ((_, found),) = reader.snapshots()
    shown = {
        b"/" + path: reader.content(entry[12], entry[13])
        for path, entry in reader.walk(found["root"])
        if entry[1] == 1
    }
    assert shown == {bytes(path): path.read_bytes() for path in source.rglob("*") if path.is_file()}


def test_a_reader_written_from_the_document_reads_a_repository_with_groups(
    tmp_path: Path, source: Path
) -> None:
    repo = RepositoryFixture(tmp_path)
    repo.back_up(source)
    require_source(Reader(repo.root), source)


def test_a_reader_written_from_the_document_reads_an_encrypted_repository_with_groups(
    tmp_path: Path, source: Path, own_home: Path
) -> None:
    repo = EncryptedRepositoryFixture(tmp_path)
    repo.back_up(source)
    require_source(EncryptedReader(repo.root, SECRET), source)
