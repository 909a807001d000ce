"""The format document: the figures in its tables are those of the code."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path

import pytest

import casfs
from casfs.backup import file_cache
from casfs.crypto import age, gpg, passphrase, recipients, session_files, trust_state
from casfs.digest import Digest, PackId
from casfs.format import (
    cipher,
    codec,
    config,
    delta,
    generation,
    group,
    key_derivation,
    lock_policy,
    pack,
    signature,
    snapshot,
    tree,
)
from casfs.index import delta_notes, fingerprint, index, schema
from casfs.index.lmdb_env import Transaction
from casfs.maintenance import prune_plan
from casfs.repository import object_locks, presence
from casfs.repository.creation import create_repository
from casfs.storage import locks, reserve
from casfs.store import layout, pack_builder, pending_removal
from casfs.trees import content
from casfs.trees import writer as tree_writer
from tests.support.builders import RepositoryFixture
from tests.support.versioned_memory import MemoryBucket

PROJECT = Path(casfs.__file__).parent.parent
DOCUMENT = (PROJECT / "casfs" / "FORMAT.md").read_text(encoding="utf-8")
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "i64": "q"}
UNITS = {
    "KiB": KIB,
    "MiB": MIB,
    "GiB": GIB,
    "TiB": GIB << 10,
    "day": 86_400,
    "hour": 3600,
    "minutes": 60,
}


def rows(title: str) -> list[list[str]]:
    """Return the rows of the first table below a heading, without its head."""
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", DOCUMENT, re.M | re.S)
    assert found is not None, f"no heading {title!r}"
    table = re.search(r"^\|.*\n\|[-| ]+\n((?:\|.*\n)+)", found[1], re.M)
    assert table is not None, f"no table below {title!r}"
    return [
        [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        for line in table[1].splitlines()
    ]


def struct_format(title: str) -> tuple[int, str]:
    """Return the first offset of a byte table, and its fields in the notation of `struct`."""
    begin = at = int(rows(title)[0][0])
    codes = ""
    for offset, kind, *_ in rows(title):
        assert int(offset) == at, f"{title}: no field begins at {offset}"
        count, _, unit = kind.partition(" ")
        code = CODES.get(kind) or count + {"bytes": "s", "zero bytes": "x"}[unit]
        codes += code
        at += struct.calcsize("<" + code)
    return begin, "<" + codes


def fields(title: str) -> list[str]:
    """Return the fields of an array's table, whose first column counts them."""
    numbers, names = zip(*((int(row[0]), row[1]) for row in rows(title)), strict=True)
    assert list(numbers) == list(range(len(numbers)))
    return list(names)


def names_by_code(title: str) -> dict[int, str]:
    return {int(row[0]): row[1].lower().replace(" ", "_") for row in rows(title)}


def members(enum: Iterable[IntEnum]) -> dict[int, str]:
    return {int(member): member.name.lower() for member in enum}


def number(text: str) -> float:
    """Return the number that a cell such as `16 MiB + 1 KiB`, `2^32 - 2` or `1/4` stands for."""
    total, sign = 0.0, 1
    for term in re.split(r" ([+-]) ", text):
        if term in "+-":
            sign = 1 if term == "+" else -1
            continue
        figure, _, unit = term.replace(",", "").partition(" ")
        base, _, power = figure.partition("^")
        above, _, below = base.partition("/")
        value = int(above) / int(below or 1)
        total += sign * value ** int(power or 1) * (UNITS[unit] if unit else 1)
    return total


@pytest.mark.parametrize(
    ("title", "layout", "begin"),
    [
        ("Pack header", pack.HEADER, 0),
        ("Pack header, encrypted part", pack._SESSION, pack.HEADER.size),
        ("Record header", pack.BLOB_HEADER, 0),
        ("Directory entry", pack.ENTRY, 0),
        ("Trailer", pack.TRAILER, 0),
        ("Extent", content.EXTENT, 0),
        ("Snapshot header", snapshot.HEADER, 0),
        ("Encrypted snapshot", snapshot._ENVELOPE, 0),
        ("Encrypted snapshot, inner header", snapshot._INNER, 0),
        ("Encrypted payload", cipher._INNER, 0),
        ("Delta header", delta._HEADER, 0),
        ("Delta header, encrypted part", delta._SESSION, delta._HEADER.size),
        ("Delta body", delta._BODY, 0),
        ("Replaced delta", delta._REPLACED, 0),
        ("Pack record of a delta", delta._PACK, 0),
        ("Note of a delta", delta_notes._NOTE, 0),
        ("Database `blobs`", schema.LOCATION, 0),
        ("Database `packs`", schema.PACK, 0),
        ("Files cache", file_cache._STAT, 0),
        ("Files cache, value header", file_cache._HEAD, 0),
    ],
)
def test_each_byte_table_has_the_layout_of_the_code(
    title: str, layout: struct.Struct, begin: int
) -> None:
    assert struct_format(title) == (begin, layout.format)


def test_magic_numbers_and_versions_are_those_of_the_code() -> None:
    def cells(title: str) -> dict[int, str]:
        return {int(row[0]): row[2] for row in rows(title)}

    header = cells("Pack header")
    assert header[0] == f"magic {pack.PACK_MAGIC.decode()}"
    assert header[8] == f"version, {pack.PACK_VERSION}"
    lengths = re.findall(r"\d+", header[10])
    assert list(map(int, lengths)) == [pack.HEADER.size, pack.SESSION_HEADER]
    assert cells("Record header")[0] == f"magic {pack.RECORD_MAGIC.decode()}"
    assert cells("Trailer")[56] == f"magic {pack.TRAILER_MAGIC.decode()}"
    assert cells("Delta header")[0] == f"magic {delta.MAGIC.decode()}"
    assert cells("Delta header")[8] == f"version, {delta.VERSION}"
    lengths = re.findall(r"\d+", cells("Delta header")[10])
    assert list(map(int, lengths)) == [delta._HEADER.size, delta.SESSION_HEADER]
    assert cells("Snapshot header")[0] == f"magic {snapshot.MAGIC.decode()}"
    assert cells("Snapshot header")[8] == f"version, {snapshot.SNAPSHOT_VERSION}"
    assert {row[0]: row[1] for row in rows("Database `meta`")}["version"] == (
        index.INDEX_VERSION.decode()
    )


def test_code_tables_list_the_members_of_the_code() -> None:
    assert names_by_code("Kinds") == {
        **members(codec.BlobKind),
        pack.ENCRYPTED_KIND: "encrypted",
        pack.DIRECTORY_KIND: "directory",
    }
    assert names_by_code("Codecs") == {**members(codec.Codec), codec.ENCRYPTED: "encrypted"}
    assert names_by_code("Node types") == members(tree.NodeType)
    assert names_by_code("Capture states") == members(tree.CaptureState)
    assert names_by_code("Change reasons") == members(tree.ChangeReason)
    kinds = [row[0] for row in rows("Recipient kinds")]
    assert kinds == list(recipients.RecipientKind)


def test_field_tables_list_the_fields_of_the_code_in_order() -> None:
    # The first line has the format, which is no field of the JSON object.
    assert config.RepositoryConfig.__struct_fields__[-1] == "format"
    settings = list(config.RepositoryConfig.__struct_fields__[:-1])
    assert [row[0] for row in rows("Configuration")] == settings
    for title, record in (
        ("Chunker fields", config.ChunkerConfig),
        ("Encryption fields", config.EncryptionConfig),
        ("Statistics", snapshot.SnapshotStats),
        ("Pending removal", pending_removal.RemovalNotice),
        ("Session files", session_files._Document),
        ("Recipients", recipients.Recipient),
        ("Generations", generation.Generation),
    ):
        assert [row[0] for row in rows(title)] == list(record.__struct_fields__), title
    assert {row[0] for row in rows("Snapshot fields")} == set(snapshot.Snapshot.__struct_fields__)
    for title, array in (
        ("Tree reference", tree.TreeRef),
        ("Node", tree.Node),
        ("Extra", tree.NodeExtra),
        ("Capture evidence", tree.Capture),
    ):
        assert fields(title) == list(array.__struct_fields__), title


def test_chunker_fields_have_the_defaults_of_the_code() -> None:
    chunker = config.ChunkerConfig()
    for name, value, _ in rows("Chunker fields"):
        default = getattr(chunker, name)
        assert (value if isinstance(default, str) else number(value)) == default, name
    assert rows("Encryption fields")[0] == ["cipher", config.CIPHER]


def test_parameters_are_those_of_the_code() -> None:
    assert {row[0]: number(row[1]) for row in rows("Parameters")} == {
        "target size of a pack": pack_builder.PACK_BYTES,
        "target size of a metadata pack": pack_builder.META_PACK_BYTES,
        "target number of blobs in a pack": pack_builder.PACK_BLOBS,
        "largest plaintext of a pack": pack_builder._PACK_PLAIN_BYTES,
        "most bytes of blobs in a group": layout.GROUP_BYTES,
        "size from which samples are compressed first": codec._SAMPLED_BYTES,
        "most extents in a node": content.MAX_INLINE_RECORDS,
        "fewest extents in a list piece": content._PIECE_MIN_RECORDS,
        "most extents in a list piece": content._PIECE_MAX_RECORDS,
        "zero bits that end a list piece": (content._PIECE_MASK + 1).bit_length() - 1,
        "fewest entries in a tree piece": tree_writer.PIECE_MIN_ENTRIES,
        "most entries in a tree piece": tree_writer.PIECE_MAX_ENTRIES,
        "most bytes in a leaf, and of names in a branch": tree_writer.PIECE_MAX_BYTES,
        "zero bits that end a tree piece": (tree_writer._PIECE_MASK + 1).bit_length() - 1,
        "most pages that an index commit changes": index._CHANGED_AT_ONCE,
        "largest index file with a digest in its fingerprint": fingerprint._HASHED_BYTES,
        "unneeded share that repacks a pack": prune_plan.DEFAULT_UNUSED_SHARE,
        "margin for readers": prune_plan.DEFAULT_MARGIN_S,
        "margin of a notice where hosts write over a network": prune_plan.SHARED_MARGIN_S,
        "refresh of a presence object": presence.REFRESH_S,
        "age at which a presence object is stale": presence.STALE_NS / 1e9,
        "reserve": reserve.RESERVE_BYTES,
    }


def test_limits_are_those_of_the_code() -> None:
    assert {row[0]: number(row[1]) for row in rows("Hostile input")} == {
        "plaintext of a blob": codec.MAX_PLAIN_BYTES,
        "payload of a blob": pack.MAX_STORED_BYTES,
        "plaintext of a group": group.MAX_GROUP_BYTES,
        "blobs in a group": group.MAX_GROUP_BLOBS,
        "blobs in a pack": pack.MAX_PACK_BLOBS,
        "size of a pack": pack.MAX_PACK_BYTES,
        "size of an index delta": delta.MAX_DELTA_BYTES,
        "bytes in a name": tree.MAX_NAME_BYTES,
        "levels of lists, and of tree pieces": tree.MAX_PIECE_LEVELS,
        "depth of directories": tree.MAX_DEPTH,
        "holes of one file": content.MAX_HOLE_BYTES,
        "files of one session that are read": session_files.MAX_READ_FILES,
        "size of these files together": session_files.MAX_READ_BYTES,
        "nodes in a snapshot": tree.MAX_COUNT,
        "largest uid and gid": tree._MAX_OWNER,
        "recipients of an age file": age.MAX_RECIPIENTS,
        "generations in a list of recipients": generation.MAX_GENERATIONS,
        "domains of a session": key_derivation.MAX_DOMAINS,
        "size of a list of snapshots": generation.MAX_LIST_BYTES,
        "size of an OpenPGP message": gpg.MAX_MESSAGE_BYTES,
        "plaintext of an OpenPGP message": gpg.MAX_PLAIN_BYTES,
    }


def test_costs_of_argon2id_are_those_of_the_code() -> None:
    costs = {row[0]: tuple(map(number, row[1:])) for row in rows("Argon2id costs")}
    assert costs == {
        "passes": (passphrase._ITERATIONS, passphrase._MOST_ITERATIONS),
        "lanes": (passphrase._LANES, passphrase._MOST_LANES),
        "memory": (passphrase._MEMORY_KIB * KIB, passphrase._MOST_MEMORY_KIB * KIB),
    }


def test_lock_table_lists_the_modes_and_their_conflicts() -> None:
    documented = {
        row[0]: set(re.findall(r"\w+", row[2].partition(";")[0])) for row in rows("Locks")
    }
    assert documented == {
        str(mode): set(map(str, conflicts)) or {"nothing"}
        for mode, conflicts in locks._CONFLICTS.items()
    }


def test_derivation_table_lists_every_context_with_its_output_size() -> None:
    prefix = "casfs 2026-11-23 "
    assert f"begins with `{prefix}`" in DOCUMENT
    contexts = {value for name, value in vars(key_derivation.KeyContext).items() if name.isupper()}
    sizes = {prefix + row[1]: int(row[3].split()[0]) for row in rows("Secrets")}
    assert sizes.keys() == contexts
    domain = key_derivation.DedupDomain(bytes(32), bytes(32))
    session = key_derivation.WriteSession(bytes(32), bytes(32), (domain,))
    context = key_derivation.KeyContext
    for name, value in (
        (context.DOMAIN_ID, domain.id),
        (context.SESSION_ID, session.id),
        (context.PACK_KEY, session.pack_key(bytes(32))),
        (context.SNAPSHOT_KEY, session.snapshot_key(bytes(32))),
        (context.DELTA_KEY, session.delta_key(bytes(32))),
        (context.DIGEST_KEY, domain.digest_key),
        (context.FILE_CACHE_KEY, domain.file_cache_key),
        (context.GENERATION_KEY, domain.generation_key),
    ):
        assert len(value) == sizes[name], name
    assert domain.chunker_seed.bit_length() <= sizes[context.CHUNKER_SEED] * 8 - 1
    assert domain.tree_seed.bit_length() <= sizes[context.TREE_SEED] * 8


def test_fields_of_a_lock_policy_are_those_of_the_code() -> None:
    documented = {row[0]: row[1] for row in rows("Lock policy")}
    assert tuple(documented) == lock_policy.LockPolicy.__struct_fields__
    assert documented["casfs"] == lock_policy._FORM
    assert lock_policy.MAX_POLICY_BYTES == 4 * KIB


def test_forms_of_small_files_are_those_of_the_code() -> None:
    documents = {row[0]: row[1] for row in rows("Session files")}
    assert documents["casfs"] == session_files._FORM
    for first_line in recipients._FIRST_LINES:
        assert f"`{first_line.decode().rstrip()}`" in DOCUMENT
    assert f"`{generation._LIST_MAGIC.decode().rstrip()}`" in DOCUMENT
    assert f"`{signature.GENERATION_CONTEXT[:-1].decode()}`" in DOCUMENT
    assert f"`{fingerprint._DAMAGED_MARK.decode().rstrip()}`" in DOCUMENT
    size, mtime, digest = "SIZE", "MTIME_NS", "DIGEST"
    line = fingerprint._FORM.format(size=size, mtime_ns=mtime, digest=digest).rstrip()
    assert f"`{line} CODE`" in DOCUMENT
    assert trust_state.WriterState.__struct_fields__[:4] == (
        "repository",
        "domain",
        "recipients",
        "last_snapshot",
    )


def test_meta_table_lists_every_key_that_an_index_writes(tmp_path: Path) -> None:
    known = index.Index(tmp_path / "index")
    try:
        known.tracks_deltas = True
        known.rebuild(tuple)
        name, other = PackId(bytes(range(32))), PackId(bytes(32))
        entries = [pack.PackEntry(Digest(bytes(32)), 32, 8, 8, 1, 0)]
        known.add_packs([(pack.PackRef(name, False), 100, entries)])
        known.mark_complete(bytes(32), known.loss_epoch())
        known.mark_for_removal([0])
        object_locks.ObjectLocks(MemoryBucket(lambda: 0, True), known, 1)._remember(["config"])
        cache = file_cache.FileCache(known, bytes(32), known.loss_epoch())
        cache.commit()
        cache.close()
        notes = delta_notes.DeltaNotes(known)
        notes.register([delta.DeltaPack(pack.PackRef(other, True), 100, entries)])
        notes.finish({delta.DeltaName(1, bytes(32)): (delta_notes.DeltaNote(1), [1])})
        known.remove_packs({0: pack.PackRef(name, False)})
        known.add_packs([(pack.PackRef(name, False), 100, entries)])
        known.remove_packs({1: pack.PackRef(other, True)})
        claimed = delta.DeltaPack(pack.PackRef(PackId(bytes([1] * 32)), False), 100, entries)
        notes.register([claimed])
        notes.finish({}, hides_removals=True)
        known.omit_places()
        known.drop_old_places()
        known.add_packs([(pack.PackRef(PackId(bytes([2] * 32)), False), 100, entries)])
        meta = known.environment.database(b"meta")

        def keys(txn: Transaction) -> list[bytes]:
            return [bytes(key) for key, _ in txn.cursor(db=meta)]

        found = [*known.environment.read(keys), b"pack" + name, b"partial" + name]
    finally:
        known.close()
    listed = {row[0].partition(" + ")[0].encode() for row in rows("Database `meta`")}
    assert schema.PARTIAL in listed
    for key in found:
        assert any(key == one or (key.startswith(one) and len(key) > len(one)) for one in listed), (
            key
        )
    for one in listed:
        assert any(key.startswith(one) for key in found), one


class TestDocumentedLayout:
    def test_the_documented_layout_is_that_of_a_new_repository(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        repo = RepositoryFixture(tmp_path)
        create_repository(tmp_path / "encrypted", passphrase="secret")
        encrypted = {path.name for path in (tmp_path / "encrypted").iterdir()} | {"index"}
        tree_block = DOCUMENT.partition("REPOSITORY/")[2].partition("```")[0]
        listed = {
            re.split(r"[/ ]", line.strip())[0] for line in tree_block.splitlines() if line.strip()
        }
        assert listed == {path.name for path in repo.root.iterdir()} | encrypted
        assert {"sessions", "identities", "recipients"} <= encrypted
        first, *_, last = (repo.root / "config").read_text().splitlines()
        assert first in DOCUMENT
        assert re.fullmatch("blake3 [0-9a-f]{64}", last)

    def test_the_format_document_is_part_of_the_installed_package(self) -> None:
        assert "*.md" in (PROJECT / "setup.cfg").read_text()


def test_the_glossary_defines_each_term_once() -> None:
    section = DOCUMENT.partition("## Glossary\n")[2].partition("\n## ")[0]
    terms = [
        term.strip()
        for row in re.findall(r"^\| ([^|]+) \| ", section, re.M)
        for term in row.split(",")
        if row not in ("term",)
    ]
    assert len(terms) == len(set(terms))
    ours = (
        "capture stable appended changed verifying-read pending-removal removal-notice write-session "
        "dedup-domain fingerprint-of-the-index"
    )
    assert {name.replace("-", " ") for name in ours.split()} <= set(terms)
