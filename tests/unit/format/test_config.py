"""The configuration: what is written is read, and nothing else is taken for it."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest

from casfs.digest import digest_of
from casfs.errors import CasfsError, FormatError, IntegrityError, NotFoundError
from casfs.format.codec import MAX_PLAIN_BYTES
from casfs.format.config import (
    ChunkerConfig,
    EncryptionConfig,
    RepositoryConfig,
    decode_config,
    encode_config,
    new_config,
)

CONFIG = RepositoryConfig(id="ab" * 32, created="2026-01-02T03:04:05Z")


def written(body: bytes, version: int = 1) -> bytes:
    """Return a file with this body and a digest that fits."""
    text = b"casfs repository, format %d\n%s\n" % (version, body)
    return text + b"blake3 %s\n" % digest_of(text).hex().encode()


def with_fields(**fields: Any) -> bytes:
    return written(json.dumps(msgspec.to_builtins(CONFIG) | fields).encode())


def with_chunker(**fields: Any) -> bytes:
    return with_fields(chunker=msgspec.to_builtins(ChunkerConfig()) | fields)


def test_a_configuration_comes_back_as_it_was_written() -> None:
    other = msgspec.structs.replace(CONFIG, tree_seed=5, chunker=ChunkerConfig(seed=9))
    for config in (CONFIG, other):
        assert decode_config(encode_config(config), "here") == config


def test_the_configuration_file_is_text_with_its_format_first_and_its_digest_last() -> None:
    lines = encode_config(CONFIG).decode("ascii").splitlines(keepends=True)
    assert lines[0] == "casfs repository, format 1\n"
    assert lines[-1] == f"blake3 {digest_of(''.join(lines[:-1]).encode()).hex()}\n"
    assert json.loads("".join(lines[1:-1])) == {
        "id": "ab" * 32,
        "created": "2026-01-02T03:04:05Z",
        "chunker": {
            "algorithm": "fastcdc-2020",
            "min_bytes": 262144,
            "avg_bytes": 1048576,
            "max_bytes": 4194304,
            "normalization": 1,
            "seed": 0,
        },
        "tree_seed": 0,
        "encryption": None,
    }


def test_every_repository_has_an_id_of_its_own() -> None:
    first, second = new_config("now"), new_config("now")
    assert first.id != second.id
    assert re.fullmatch("[0-9a-f]{64}", first.id)


@pytest.mark.parametrize("version", [0, 3, 17, 999_999_999])
def test_another_format_is_named_whatever_follows_the_first_line(version: int) -> None:
    data = b"casfs repository, format %d\n\0what nobody knows yet" % version
    with pytest.raises(FormatError, match=f"here has repository format {version}") as caught:
        decode_config(data, "here")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[core]\n\tbare = false\n",
        b"casfs repository, format one\n",
        b"casfs repository, format 1",
        b"casfs repository, format 1000000000\n",
        b" " + encode_config(CONFIG),
    ],
)
def test_a_file_of_something_else_is_no_repository(data: bytes) -> None:
    with pytest.raises(NotFoundError, match="here is not a casfs repository"):
        decode_config(data, "here")


def test_any_changed_byte_is_noticed() -> None:
    data = encode_config(CONFIG)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 0x01
        with pytest.raises((IntegrityError, FormatError, NotFoundError)):
            decode_config(bytes(changed), "here")


def test_a_file_that_was_cut_is_refused_at_any_place() -> None:
    data = encode_config(CONFIG)
    for end in range(len(data)):
        with pytest.raises(CasfsError):
            decode_config(data[:end], "here")


def test_bytes_after_the_digest_of_a_configuration_are_refused() -> None:
    with pytest.raises(IntegrityError):
        decode_config(encode_config(CONFIG) + b"\n", "here")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'{"id": 5, "created": ""}',
        b'{"id": "\xff", "created": ""}',
        b'{"id": "", "created": "", "encryption": ' + b'{"a":' * 90_000 + b"1" + b"}" * 90_001,
    ],
)
def test_a_body_that_does_not_parse_is_damage(body: bytes) -> None:
    with pytest.raises(IntegrityError, match="here is damaged"):
        decode_config(written(body), "here")


@pytest.mark.parametrize(
    "encryption",
    [
        {"kind": "age"},
        {"cipher": "rot13", "session": "ab" * 32, "domain": "cd" * 32},
        {"cipher": "aes-256-gcm", "session": "ab" * 31, "domain": "cd" * 32},
    ],
)
def test_an_encryption_that_is_not_known_is_refused(encryption: dict[str, str]) -> None:
    with pytest.raises(FormatError, match="uses an encryption"):
        decode_config(with_fields(encryption=encryption), "here")


def test_the_encryption_survives_the_file() -> None:
    reported = {"cipher": "aes-256-gcm", "session": "ab" * 32, "domain": "cd" * 32}
    found = decode_config(with_fields(encryption=reported), "here")
    assert found.encryption == EncryptionConfig("aes-256-gcm", "ab" * 32, "cd" * 32)
    assert decode_config(encode_config(found), "here") == found


def test_fields_that_a_later_version_adds_are_left_alone() -> None:
    assert decode_config(with_fields(comment="from the future"), "here") == CONFIG


@pytest.mark.parametrize(
    "fields",
    [
        {"algorithm": "rabin"},
        {"min_bytes": 0},
        {"min_bytes": 1 << 21},
        {"avg_bytes": 1 << 23},
        {"max_bytes": MAX_PLAIN_BYTES + 1},
        {"max_bytes": -1},
        {"normalization": 4},
        {"seed": -1},
        {"seed": 1 << 64},
    ],
)
def test_a_chunker_that_would_cut_unreadable_chunks_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises((FormatError, IntegrityError)):
        decode_config(with_chunker(**fields), "here")


def test_chunks_may_be_as_large_as_a_blob() -> None:
    config = decode_config(with_chunker(max_bytes=MAX_PLAIN_BYTES), "here")
    assert config.chunker.max_bytes == MAX_PLAIN_BYTES
