"""The lock policy's object: what is refused, and what its code proves."""

from __future__ import annotations

import msgspec
import pytest

from casfs.digest import digest_of
from casfs.errors import IntegrityError
from casfs.format.lock_policy import (
    FOLDER,
    MAX_LOCK_S,
    decode_policy,
    encode_policy,
    new_policy,
)

REPOSITORY = "ab" * 32
KEY = bytes(range(32))


def named(data: bytes) -> tuple[str, bytes]:
    return f"{FOLDER}/{digest_of(data).hex()}", data


def test_a_policy_comes_back_as_it_was() -> None:
    policy = new_policy(REPOSITORY, 86_400, 5, KEY)
    name, data = encode_policy(policy)
    assert decode_policy(name, data, REPOSITORY) == policy
    assert policy.is_authentic(KEY)


def test_a_code_of_another_key_or_another_policy_is_not_authentic() -> None:
    policy = new_policy(REPOSITORY, 86_400, 5, KEY)
    assert not policy.is_authentic(bytes(32))
    assert not msgspec.structs.replace(policy, lock_for_s=1).is_authentic(KEY)
    assert not new_policy(REPOSITORY, 86_400, 5, None).is_authentic(KEY)
    assert not msgspec.structs.replace(policy, code="é").is_authentic(KEY)


def test_the_bytes_of_a_policy_stay_the_same() -> None:
    _, data = encode_policy(new_policy(REPOSITORY, 86_400, 5, None))
    assert data == (
        b'{"casfs":"lock policy 1","repository":"' + REPOSITORY.encode() + b'",'
        b'"lock_for_s":86400,"set_ns":5,"code":""}\n'
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"repository": "cd" * 32},
        {"casfs": "lock policy 2"},
        {"lock_for_s": -1},
        {"lock_for_s": MAX_LOCK_S + 1},
        {"set_ns": -1},
        {"set_ns": 1 << 63},
    ],
)
def test_a_policy_of_something_else_or_out_of_range_is_refused(changes: dict[str, object]) -> None:
    policy = msgspec.structs.replace(new_policy(REPOSITORY, 86_400, 5, None), **changes)
    with pytest.raises(IntegrityError):
        decode_policy(*encode_policy(policy), REPOSITORY)


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 4000, b"\xff", b'{"casfs":1}'])
def test_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        decode_policy(*named(data), REPOSITORY)


def test_a_name_that_is_not_the_digest_is_refused() -> None:
    name, data = encode_policy(new_policy(REPOSITORY, 86_400, 5, None))
    with pytest.raises(IntegrityError, match="digest mismatch"):
        decode_policy(name, data + b" ", REPOSITORY)
