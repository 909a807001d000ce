"""The format document: its numbers are those of the code, and it suffices to write a reader."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard
from blake3 import blake3

import casfs
from casfs.crypto import passphrase, recipients, session_files, trust_state
from casfs.format import codec as blob
from casfs.format import config, key_derivation, pack, snapshot, tree
from casfs.index import schema as tables
from casfs.repository.opening import create_repository
from casfs.store import writer
from casfs.trees import content
from casfs.trees import writer as treewriter
from tests.support.builders import RepositoryFixture

PROJECT = Path(casfs.__file__).parent.parent
DOCUMENT = (PROJECT / "casfs" / "FORMAT.md").read_text(encoding="utf-8")
FROZEN = PROJECT / "tests" / "data" / "repository-v1"
KIB, MIB = 1 << 10, 1 << 20


def section(title: str) -> str:
    """Return the text between a heading and the next."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", DOCUMENT, re.M | re.S)
    assert found is not None, f"there is no section {title!r}"
    return found[1]


def plain(title: str) -> str:
    """Return a section as one line, however its lines are wrapped."""
    return re.sub(r"\s+", " ", section(title))


def rows(title: str) -> list[list[str]]:
    """Return the rows of a section's tables, without their heads."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = {number - 1 for number, row in enumerate(cells) if set(row[0]) <= {"-"}}
    return [
        row for number, row in enumerate(cells) if number not in heads and not set(row[0]) <= {"-"}
    ]


def numbered(text: str) -> dict[int, str]:
    """Return the word after each number in a list such as `0 raw, 1 zstd`."""
    return {int(n): name.strip() for n, name in re.findall(r"(\d+) `?([A-Za-z ]+?)`?(?=,|$)", text)}


def code_names(members: Iterable[Any]) -> dict[int, str]:
    return {int(member): member.name.lower().replace("_", " ") for member in members}


class TestDocumentedNumbers:
    def test_the_document_has_the_numbers_of_packs(self) -> None:
        text = plain("Packs")
        assert f"**Header**, {pack.HEADER.size} bytes: magic `CASFSPAK`" in text
        assert pack.PACK_MAGIC == b"CASFSPAK"
        assert f"version = {pack.PACK_VERSION} (u16)" in text
        assert f"**Record**, {pack.BLOB_HEADER.size} bytes" in text
        assert f"one entry of {pack.ENTRY.size} bytes" in text
        assert f"**Trailer**, {pack.TRAILER.size} bytes" in text
        assert f"magic `{pack.TRAILER_MAGIC.decode()}`" in text
        assert f"{writer.PACK_BYTES // MIB} MiB or {writer.PACK_BLOBS:,} blobs" in text

    def test_the_document_has_the_numbers_of_records(self) -> None:
        by_offset = {int(row[0]): (int(row[1]), row[2]) for row in rows("Packs")}
        assert sorted(by_offset) == [0, 4, 5, 6, 8, 12]
        assert sum(size for size, _ in by_offset.values()) == pack.BLOB_HEADER.size
        assert by_offset[0][1] == f"magic `{pack.RECORD_MAGIC.decode()}`"
        kinds = numbered(by_offset[4][1].removeprefix("kind: "))
        assert {number: name.lower() for number, name in kinds.items()} == {
            **code_names(blob.BlobKind),
            pack.ENCRYPTED_KIND: "encrypted",
            pack.DIRECTORY_KIND: "the directory",
        }
        codecs = numbered(by_offset[5][1].removeprefix("codec: ").partition(" (")[0])
        assert codecs == code_names(blob.Codec)
        assert f"at most {blob.MAX_PLAIN_BYTES // MIB} MiB" in by_offset[12][1]

    def test_the_document_has_the_numbers_of_chunks(self) -> None:
        chunker = config.ChunkerConfig()
        text = plain("Chunks")
        assert f"minimum of {chunker.min_bytes // KIB} KiB" in text
        assert f'{chunker.avg_bytes // MIB} MiB "average"' in text
        assert f"{chunker.max_bytes // MIB} MiB maximum" in text
        assert f"normalization {chunker.normalization}" in text

    def test_the_document_has_the_numbers_of_content_lists(self) -> None:
        text = plain("Content lists")
        assert f"a list of {content.EXTENT.size}-byte records" in text
        assert f"At most {content.MAX_INLINE_RECORDS} records stand in the node" in text
        bounds = content._PIECE_MIN_RECORDS, content._PIECE_MAX_RECORDS
        assert f"({bounds[0]} to {bounds[1]:,} records a piece)" in text
        assert content._PIECE_MASK == (1 << 10) - 1 and "ten zero bits" in text
        assert f"at most {tree.MAX_PIECE_LEVELS}." in text

    def test_the_document_has_the_numbers_of_trees(self) -> None:
        text = plain("Trees")
        least, most = treewriter.PIECE_MIN_ENTRIES, treewriter.PIECE_MAX_ENTRIES
        assert f"more than {least:,} is split" in text
        assert f"at least {least:,} entries" in text
        assert f"with {most:,} entries, or with {treewriter.PIECE_MAX_BYTES // MIB} MiB" in text
        assert treewriter._PIECE_MASK == (1 << 11) - 1 and "eleven zero bits" in text
        assert f"Names are 1 to {tree.MAX_NAME_BYTES} bytes" in text

    def test_the_document_has_the_numbers_of_snapshots(self) -> None:
        text = plain("Snapshots")
        assert f"A file of {snapshot.HEADER.size} bytes of header" in text
        assert f"magic `{snapshot.MAGIC.decode()}`, version = {snapshot.SNAPSHOT_VERSION}" in text

    def test_the_document_has_the_bounds_of_the_code(self) -> None:
        text = plain("Hostile input")
        for bound in (
            f"{blob.MAX_PLAIN_BYTES // MIB} MiB a plaintext",
            f"{blob.MAX_PLAIN_BYTES // MIB} MiB + 1 KiB a payload",
            f"{pack.MAX_PACK_BLOBS:,} blobs a pack",
            f"{tree.MAX_PIECE_LEVELS} levels of lists and of splits",
            f"{tree.MAX_DEPTH:,} directories deep",
            f"2^{tree.MAX_COUNT.bit_length() - 1} nodes",
            f"{pack.MAX_PACK_BYTES >> 30} GiB a pack",
        ):
            assert bound in text
        assert pack.MAX_STORED_BYTES == blob.MAX_PLAIN_BYTES + KIB


class TestDocumentedFields:
    def test_the_document_lists_the_fields_of_the_configuration(self) -> None:
        reported = [row[0].strip("`") for row in rows("Configuration")]
        assert reported == list(config.RepositoryConfig.__struct_fields__)
        (chunker,) = [row[1] for row in rows("Configuration") if row[0] == "`chunker`"]
        for name in config.ChunkerConfig.__struct_fields__:
            assert f"`{name}`" in chunker

    def test_the_document_lists_the_fields_of_a_node_in_their_order(self) -> None:
        reported: list[str] = []
        for places, names, _ in rows("Trees"):
            reported += [name.strip() for name in names.split(",")]
            assert places == ", ".join(str(n) for n in range(len(reported)))[-len(places) :]
        fields = [name.removesuffix("_ns") for name in tree.Node.__struct_fields__]
        assert reported == fields
        assert f"**Node**, an array of {len(fields)}:" in plain("Trees")

    def test_the_document_lists_the_values_of_node_fields(self) -> None:
        meaning = {row[1]: row[2] for row in rows("Trees")}
        assert {n: name.lower() for n, name in numbered(meaning["kind"]).items()} == code_names(
            tree.NodeType
        )
        assert numbered(meaning["state"]) == code_names(tree.CaptureState)
        reasons = re.search(r"reason (0 none.*?);", plain("Trees"))
        assert reasons is not None
        assert numbered(reasons[1]) == code_names(tree.ChangeReason)

    def test_the_document_lists_the_fields_of_node_extras(self) -> None:
        text = plain("Trees")
        assert f"`[{', '.join(tree.NodeExtra.__struct_fields__)}]`" in text
        assert f"`[{', '.join(tree.Capture.__struct_fields__)}]`" in text
        assert tree.TreeRef.__struct_fields__ == ("digest", "nodes", "total_bytes", "flagged")
        assert "`[digest, nodes, bytes, flagged]`" in text

    def test_the_document_lists_the_fields_of_a_snapshot(self) -> None:
        reported = {name for row in rows("Snapshots") for name in re.findall(r"`(\w+)`", row[0])}
        assert reported == set(snapshot.Snapshot.__struct_fields__)
        (stats,) = [row[1] for row in rows("Snapshots") if row[0] == "`stats`"]
        for name in snapshot.SnapshotStats.__struct_fields__:
            words = "new blobs and bytes" if name.startswith("new_") else name.replace("_", " ")
            assert words in stats

    def test_the_document_lists_the_tables_of_the_index(self) -> None:
        reported = {row[0].strip("`"): row[2] for row in rows("Index")}
        assert list(reported) == ["blobs", "packs", "meta"]
        assert reported["blobs"].startswith(f"{tables.LOCATION.size} bytes")
        assert reported["packs"].startswith(f"{tables.PACK.size} bytes")
        assert reported["meta"].count(",") == tables.COUNTERS.size // 8


class TestDocumentedLayout:
    def test_the_documented_layout_is_that_of_a_new_repository(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        repo = RepositoryFixture(tmp_path)
        create_repository(tmp_path / "encrypted", passphrase="secret")
        encrypted = {path.name for path in (tmp_path / "encrypted").iterdir()} | {"index"}
        reported = {
            re.split(r"[/ ]", line.strip())[0]
            for line in section("Layout")
            .partition("REPOSITORY/")[2]
            .partition("```")[0]
            .splitlines()
            if line.strip()
        }
        assert reported == {path.name for path in repo.root.iterdir()} | encrypted
        assert {"sessions", "identities", "recipients"} <= encrypted
        first, *_, last = (repo.root / "config").read_text().splitlines()
        assert first in plain("Configuration")
        assert re.fullmatch("blake3 [0-9a-f]{64}", last)

    def test_the_format_document_is_part_of_the_installed_package(self) -> None:
        assert "*.md" in (PROJECT / "setup.cfg").read_text()


class Reader:
    """A reader that was written with the document and without the code."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = {
            digest: data
            for path in sorted(root.glob("packs/*/*"))
            for digest, data in self.pack(path)
        }

    @staticmethod
    def plain(codec: int, payload: bytes, size: int) -> bytes:
        data = zstandard.ZstdDecompressor().decompress(payload) if codec == 1 else payload
        assert codec in (0, 1) and len(data) == size
        return data

    def pack(self, path: Path) -> Iterator[tuple[bytes, bytes]]:
        data = path.read_bytes()
        assert blake3(data).hexdigest() == path.name
        assert struct.unpack("<8sHHI", data[:16]) == (b"CASFSPAK", 1, 16, 0)
        at, size, count, digest = struct.unpack("<QII32s", data[-64:-16])
        assert data[-16:] == bytes(8) + b"CASFSEND"
        directory = data[at : at + size]
        assert blake3(directory).digest() == digest
        entries = list(struct.iter_unpack("<32sIIBBH", directory))
        assert len(entries) == count
        offset = at - 16 - sum(16 + stored for _, stored, *_ in entries)
        for digest, stored, plain_bytes, kind, codec, _ in entries:
            head = struct.unpack("<4sBBHII", data[offset : offset + 16])
            assert head == (b"cBLB", kind, codec, 0, stored, plain_bytes)
            payload = data[offset + 16 : offset + 16 + stored]
            found = self.plain(codec, payload, plain_bytes)
            assert blake3(found).digest() == digest
            yield digest, found
            offset += 16 + stored

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


@pytest.mark.parametrize("part", ["names", "contents"])
def test_a_reader_written_from_the_document_reads_the_frozen_repository(part: str) -> None:
    manifest = json.loads(FROZEN.with_suffix(".json").read_text())
    reader = Reader(FROZEN)
    seen = set()
    for name, found in reader.snapshots():
        entries = dict(reader.walk(found["root"]))
        seen.add(name)
        reported = {base64.b64decode(path): what for path, what in manifest[name].items()}
        assert entries.keys() == reported.keys()
        if part == "names":
            assert found["root"][15][1] == len(entries)
            continue
        for path, entry in entries.items():
            if entry[1] == 1:
                data = reader.content(entry[12], entry[13])
                assert len(data) == entry[9]
                assert blake3(data).hexdigest() == reported[path]["blake3"]
                assert entry[14] in (None, blake3(data).digest())
    assert seen == set(manifest)


class TestDocumentedEncryption:
    def test_the_document_names_every_context_of_key_derivation(self) -> None:
        text = plain("Encryption")
        prefix = "casfs 2026-11-23 "
        assert f"begin with `{prefix}`" in text
        contexts = [
            value
            for name, value in vars(key_derivation.KeyContext).items()
            if not name.startswith("_")
        ]
        assert len(set(contexts)) == len(contexts) == 8
        for context in contexts:
            assert context.startswith(prefix)
            short = context.removeprefix(prefix)
            reported = f"derive(`{short}`" in text
            assert reported, context

    def test_the_document_has_the_sizes_codes_and_forms_of_encryption(self) -> None:
        text = plain("Encryption")
        assert f"kind {pack.ENCRYPTED_KIND}" in text and f"codec {blob.ENCRYPTED}" in text
        assert f"the length is {pack.SESSION_HEADER}" in plain("Packs")
        assert f'"cipher": "{config.CIPHER}"' in plain("Configuration")
        for module, form in ((session_files, "session 1"), (passphrase, "identity 1")):
            assert form == module._FORM
        assert '"casfs": "session 1"' in text
        assert "`casfs recipients 1`" in text
        assert recipients._FIRST_LINE == b"casfs recipients 1\n"
        costs = (passphrase._ITERATIONS, passphrase._LANES, passphrase._MEMORY_KIB // KIB)
        assert "{} passes, {} lanes, {} MiB".format(*costs) in text
        assert set(numbers_of_kinds(text)) == {str(kind) for kind in recipients.RecipientKind}
        assert trust_state.WriterState.__struct_fields__[:3] == (
            "repository",
            "domain",
            "recipients",
        )


def numbers_of_kinds(text: str) -> list[str]:
    reported = re.search(r"has `kind` \(([^)]*)\)", text)
    assert reported is not None
    return re.findall(r"`(\w+)`", reported[1])
