"""Generations of a repository's own dedup domain (FORMAT.md, "Generations").

The configuration names the first domain. A removal of recipients replaces it, because they know it: a record
in the list of recipients names the new domain. The code of a record shows that its writer knew the domain
before, which the storage never has. The signature shows which machine it was.

A former recipient can still write in the old domain. So each record also names the list of the snapshots
that existed when the domain was replaced: only these stay proven.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
from blake3 import blake3

from casfs.digest import SnapshotId, codes_equal, digest_of
from casfs.errors import IntegrityError, UsageError
from casfs.format.key_derivation import DedupDomain, DomainId, SessionId, WriteSession

if TYPE_CHECKING:
    from casfs.format.signature import SigningKey

FOLDER = "domains"
"""The folder of the lists of snapshots."""

MAX_GENERATIONS = 1000
MAX_LIST_BYTES = 32 * 1024 * 1024
_LIST_MAGIC = b"casfs snapshots 1\n"
_ID_BYTES = 32
_ID = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")


class Generation(msgspec.Struct, frozen=True):
    """The record of a domain that replaced another one; all fields but `number` are hexadecimal.

    `number` counts the replacements from 1. `domain` is the id of the new domain and `session` that of a
    session with its secret. `snapshots` is the digest of the list of the snapshots that existed before. `key`
    is the public signing key of the machine that replaced the domain.
    """

    number: int
    domain: str
    session: str
    snapshots: str
    key: str
    code: str = ""
    signature: str = ""

    @property
    def domain_id(self) -> DomainId:
        """The id of the new domain."""
        return DomainId(bytes.fromhex(self.domain))

    @property
    def session_id(self) -> SessionId:
        """The id of a session with the secret of the new domain."""
        return SessionId(bytes.fromhex(self.session))

    @property
    def list_name(self) -> str:
        """The name of the object with the list of snapshots."""
        return f"{FOLDER}/{self.snapshots}"

    def is_authentic(self, repository: bytes, before: DedupDomain) -> bool:
        """Return whether a machine that knew the domain before made the record and signed it."""
        from casfs.format.signature import has_signed_generation

        if not codes_equal(self.code, _code(self, before)):
            return False
        key, signature = bytes.fromhex(self.key), bytes.fromhex(self.signature)
        return has_signed_generation(key, signature, repository, _signed(self))


def new_generation(
    number: int, before: DedupDomain, session: WriteSession, snapshots: str, key: SigningKey
) -> Generation:
    """Return the record of the first domain of `session`, which replaces the domain `before`.

    `snapshots` is the digest of the list of snapshots, and `key` that of this machine.
    """
    domain = session.domains[0]
    record = Generation(number, domain.id.hex(), session.id.hex(), snapshots, key.public.hex())
    record = msgspec.structs.replace(record, code=_code(record, before))
    signature = key.sign_generation(session.repository, _signed(record))
    return msgspec.structs.replace(record, signature=signature.hex())


def require_valid(records: list[Generation]) -> None:
    """Raise IntegrityError unless the records are well-formed and number the generations from 1."""
    if len(records) > MAX_GENERATIONS:
        raise IntegrityError(f"there are more than {MAX_GENERATIONS} generations")
    for number, record in enumerate(records, 1):
        ids = (record.domain, record.session, record.snapshots, record.key, record.code)
        is_valid = all(map(_ID.fullmatch, ids)) and _SIGNATURE.fullmatch(record.signature)
        if not is_valid or record.number != number:
            raise IntegrityError(f"the record of generation {number} is invalid")


def encode_snapshot_list(snapshots: Iterable[SnapshotId]) -> tuple[str, bytes]:
    """Return the digest and the bytes of a list of snapshots.

    Raise UsageError where they are more than a reader accepts.
    """
    ids = sorted(set(snapshots))
    data = _LIST_MAGIC + b"".join(ids)
    if len(data) > MAX_LIST_BYTES:
        raise UsageError(
            f"the repository has {len(ids)} snapshots, more than the "
            f"{(MAX_LIST_BYTES - len(_LIST_MAGIC)) // _ID_BYTES} that a list can name; forget some of them"
        )
    return digest_of(data).hex(), data


def decode_snapshot_list(record: Generation, data: bytes) -> frozenset[SnapshotId]:
    """Parse the list that a record names; raise IntegrityError for a damaged one."""
    if digest_of(data).hex() != record.snapshots:
        raise IntegrityError(f"{record.list_name} is damaged: digest mismatch")
    ids = data.removeprefix(_LIST_MAGIC)
    if not data.startswith(_LIST_MAGIC) or len(ids) % _ID_BYTES:
        raise IntegrityError(f"{record.list_name} is no list of snapshots")
    begins = range(0, len(ids), _ID_BYTES)
    return frozenset(SnapshotId(ids[begin : begin + _ID_BYTES]) for begin in begins)


def _code(record: Generation, before: DedupDomain) -> str:
    plain = msgspec.json.encode(msgspec.structs.replace(record, code="", signature=""))
    return blake3(plain, key=before.generation_key).hexdigest()


def _signed(record: Generation) -> bytes:
    return msgspec.json.encode(msgspec.structs.replace(record, signature=""))
