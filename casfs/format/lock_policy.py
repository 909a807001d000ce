"""The lock policy: for how long a repository's objects are locked (FORMAT.md, "Lock policy").

Each change is a new object, named by the digest of its bytes. In an encrypted repository it carries a code
that only a machine with the repository's own domain can compute.
"""

from __future__ import annotations

import msgspec
from blake3 import blake3

from casfs.digest import codes_equal, digest_of
from casfs.errors import IntegrityError
from casfs.json_document import InvalidJsonError, parse_json

FOLDER = "lock-policies"
MAX_POLICY_BYTES = 4096
MAX_LOCK_S = 10 * 366 * 86_400
"""Ten years: a lock cannot be taken back, so a longer time is more likely a mistake, or an attack."""
MAX_SET_NS = (1 << 63) - 1
_FORM = "lock policy 1"


class LockPolicy(msgspec.Struct, frozen=True):
    """Objects are locked for `lock_for_s` seconds (0: not at all).

    `set_ns` is when that was decided, by the clock of the machine that did. `code` is hexadecimal, and empty
    in a repository without encryption.
    """

    casfs: str
    repository: str
    lock_for_s: int
    set_ns: int
    code: str = ""

    def is_authentic(self, key: bytes) -> bool:
        """Return whether the code was computed with the key of the repository's own domain."""
        return codes_equal(self.code, _code(self, key))


def new_policy(repository: str, lock_for_s: int, set_ns: int, key: bytes | None) -> LockPolicy:
    """Return a policy of a repository (its id), with a code if a key is given."""
    policy = LockPolicy(_FORM, repository, lock_for_s, set_ns)
    return policy if key is None else msgspec.structs.replace(policy, code=_code(policy, key))


def encode_policy(policy: LockPolicy) -> tuple[str, bytes]:
    """Return the name and the bytes of the object of a policy."""
    data = msgspec.json.encode(policy) + b"\n"
    return f"{FOLDER}/{digest_of(data).hex()}", data


def decode_policy(name: str, data: bytes, repository: str) -> LockPolicy:
    """Parse the bytes of a policy's object; raise IntegrityError unless it is one of this repository."""
    if name != f"{FOLDER}/{digest_of(data).hex()}":
        raise IntegrityError(f"{name}: digest mismatch")
    try:
        policy = parse_json(data, LockPolicy)
    except InvalidJsonError as error:
        raise IntegrityError(f"{name} cannot be parsed: {error}") from error
    if policy.casfs != _FORM or policy.repository != repository:
        raise IntegrityError(f"{name} is no lock policy of this repository")
    if not (0 <= policy.lock_for_s <= MAX_LOCK_S and 0 <= policy.set_ns <= MAX_SET_NS):
        raise IntegrityError(f"{name} has a time that is out of range")
    return policy


def _code(policy: LockPolicy, key: bytes) -> str:
    plain = msgspec.json.encode(msgspec.structs.replace(policy, code=""))
    return blake3(plain, key=key).hexdigest()
