"""The record of a dedup domain that replaced another one, and the list of snapshots that it names."""

from __future__ import annotations

import msgspec
import pytest

from casfs.digest import SnapshotId, digest_of
from casfs.errors import IntegrityError, UsageError
from casfs.format import generation as generation_module
from casfs.format.generation import (
    Generation,
    decode_snapshot_list,
    encode_snapshot_list,
    new_generation,
)
from casfs.format.key_derivation import DedupDomain
from casfs.format.signature import SigningKey
from tests.support.encryption import (
    DOMAIN,
    GENERATION,
    REPOSITORY,
    SECOND_DOMAIN,
    SECOND_SESSION,
    SIGNING_KEY,
)

IDS = [SnapshotId(bytes([number] * 32)) for number in (3, 1, 2)]


def test_a_record_is_authentic_for_those_who_know_the_domain_before() -> None:
    assert GENERATION.is_authentic(REPOSITORY, DOMAIN)
    assert GENERATION.domain_id == SECOND_DOMAIN.id
    assert GENERATION.session_id == SECOND_SESSION.id
    assert GENERATION.key == SIGNING_KEY.public.hex()


@pytest.mark.parametrize("field", Generation.__struct_fields__)
def test_a_record_with_any_other_field_is_not_authentic(field: str) -> None:
    value = getattr(GENERATION, field)
    other = 2 if field == "number" else value.translate(str.maketrans("0123456789", "1234567890"))
    assert not msgspec.structs.replace(GENERATION, **{field: other}).is_authentic(
        REPOSITORY, DOMAIN
    )


def test_a_record_of_a_machine_that_did_not_know_the_domain_is_not_authentic() -> None:
    guessed = DedupDomain(REPOSITORY, bytes(32))
    forged = new_generation(1, guessed, SECOND_SESSION, GENERATION.snapshots, SIGNING_KEY)
    assert not forged.is_authentic(REPOSITORY, DOMAIN)
    assert not GENERATION.is_authentic(REPOSITORY, SECOND_DOMAIN)


def test_a_record_that_another_machine_signed_is_not_authentic() -> None:
    """A former recipient knows the domain and computes the code, but does not have the key of the machine."""
    thief = SigningKey(bytes(32))
    forged = new_generation(1, DOMAIN, SECOND_SESSION, GENERATION.snapshots, thief)
    assert forged.is_authentic(REPOSITORY, DOMAIN)
    as_admin = msgspec.structs.replace(forged, key=GENERATION.key)
    assert not as_admin.is_authentic(REPOSITORY, DOMAIN)
    assert not GENERATION.is_authentic(bytes(32), DOMAIN)


def test_a_list_of_snapshots_is_decoded_as_it_was_encoded() -> None:
    digest, data = encode_snapshot_list([*IDS, IDS[0]])
    record = msgspec.structs.replace(GENERATION, snapshots=digest)
    assert record.list_name == f"domains/{digest}"
    assert decode_snapshot_list(record, data) == set(IDS)
    empty, data = encode_snapshot_list([])
    assert decode_snapshot_list(msgspec.structs.replace(GENERATION, snapshots=empty), data) == set()
    assert data


def test_a_damaged_list_of_snapshots_is_refused() -> None:
    digest, data = encode_snapshot_list(IDS)
    record = msgspec.structs.replace(GENERATION, snapshots=digest)
    for damaged in (data[:-1], data + b"x", b"", data[:-1] + bytes([data[-1] ^ 1])):
        with pytest.raises(IntegrityError, match="is damaged: digest mismatch"):
            decode_snapshot_list(record, damaged)
    for other in (b"", b"x" * 50, data[:-1]):
        named = msgspec.structs.replace(GENERATION, snapshots=digest_of(other).hex())
        with pytest.raises(IntegrityError, match="is no list of snapshots"):
            decode_snapshot_list(named, other)


def test_more_snapshots_than_a_list_can_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, data = encode_snapshot_list(IDS)
    monkeypatch.setattr(generation_module, "MAX_LIST_BYTES", len(data) - 1)
    with pytest.raises(UsageError, match="has 3 snapshots, more than the 2"):
        encode_snapshot_list(IDS)
