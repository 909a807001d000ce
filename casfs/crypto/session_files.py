"""Session files: the secrets of a write session, encrypted to the recipients.

`sessions/ID/DIGEST.age` and `….gpg` contain the same JSON document and nothing else, so the plain `age` and
`gpg` decrypt them. Each file is named by the digest of its bytes and never rewritten (FORMAT.md,
"Encryption").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from casfs.crypto import age, gpg
from casfs.crypto.age import AgeIdentity
from casfs.crypto.recipients import Recipient, wrap
from casfs.digest import digest_of, short_id
from casfs.errors import KeyMissingError, NotFoundError, RefusedError, SessionError
from casfs.format.config import ChunkerConfig
from casfs.format.key_derivation import (
    MAX_DOMAINS,
    SECRET_BYTES,
    DedupDomain,
    SessionId,
    WriteSession,
)
from casfs.json_document import parse_json
from casfs.storage.base import Storage

SESSIONS = "sessions"

NOTHING_GIVEN = (
    "is encrypted and no key was given: give --identity FILE, or a passphrase "
    "(--passphrase-file, --passphrase-command, or at a terminal)"
)

_MAX_FILE_BYTES = 16 << 20
MAX_READ_FILES = 1000
MAX_READ_BYTES = 64 << 20
"""Limits of the files that are read of one session: a writer can add files that do not decrypt."""
_FORM = "session 1"


class _Document(msgspec.Struct, frozen=True):
    casfs: str
    repository: str
    id: str
    secret: str
    domains: list[str]
    chunker: ChunkerConfig | msgspec.UnsetType = msgspec.UNSET


class WrappedFile(NamedTuple):
    """One file of a session: its name in the storage, and whether `age` or `gpg` decrypts it."""

    name: str
    suffix: str


def encode_session(session: WriteSession) -> bytes:
    """Return the document with the session's secrets."""
    document = _Document(
        _FORM,
        session.repository.hex(),
        session.id.hex(),
        session.secret.hex(),
        [domain.secret.hex() for domain in session.domains],
        session.chunker if session.chunker is not None else msgspec.UNSET,
    )
    return msgspec.json.encode(document) + b"\n"


def decode_session(data: bytes, session_id: bytes, repository: bytes) -> WriteSession:
    """Parse a document; raise SessionError unless it belongs to this session of this repository."""
    label = f"session {short_id(session_id)}"
    try:
        document = parse_json(data, _Document)
        secrets = [bytes.fromhex(text) for text in (document.secret, *document.domains)]
        made_for = bytes.fromhex(document.repository)
    except ValueError as error:
        raise SessionError(f"{label} has an invalid document") from error
    if document.casfs != _FORM:
        raise SessionError(f"{label} has an unsupported format; use a newer casfs")
    if made_for != repository:
        raise SessionError(f"{label} belongs to another repository, {document.repository[:12]}")
    is_valid = 2 <= len(secrets) <= MAX_DOMAINS + 1
    if not is_valid or any(len(one) != SECRET_BYTES for one in secrets):
        raise SessionError(f"{label} has secrets of an invalid number or size")
    domains = tuple(DedupDomain(repository, secret) for secret in secrets[1:])
    chunker = None if document.chunker is msgspec.UNSET else document.chunker
    session = WriteSession(repository, secrets[0], domains, chunker)
    if session.id != session_id:
        raise SessionError(f"{label} contains the secrets of another session")
    return session


def session_ids(storage: Storage) -> list[SessionId]:
    """Return the ids of the sessions in the storage, sorted."""
    found = set()
    for name, _, _ in storage.list(SESSIONS):
        parts = name.split("/")
        if len(parts) == 3 and len(parts[1]) == 64:
            try:
                found.add(SessionId(bytes.fromhex(parts[1])))
            except ValueError:
                continue
    return sorted(found)


def list_session_files(storage: Storage, session_id: SessionId) -> list[WrappedFile]:
    """Return the files of a session, age files first."""
    names = [name for name, _, _ in storage.list(f"{SESSIONS}/{session_id.hex()}")]
    files = [WrappedFile(name, name.rpartition(".")[2]) for name in names]
    return sorted(file for file in files if file.suffix in ("age", "gpg"))


def write_session(
    storage: Storage, session: WriteSession, recipients: Sequence[Recipient]
) -> list[str]:
    """Encrypt a session to its recipients and store it durably; return the names of the files.

    Raise RefusedError for more domains than a reader accepts: what is stored in it could never be read.
    """
    if len(session.domains) > MAX_DOMAINS:
        raise RefusedError(
            f"a session would have {len(session.domains):,} deduplication domains, and a reader accepts "
            f"at most {MAX_DOMAINS:,}"
        )
    names = []
    for suffix, data in wrap(encode_session(session), recipients):
        name = f"{SESSIONS}/{session.id.hex()}/{digest_of(data).hex()}.{suffix}"
        storage.write(name, data)
        names.append(name)
    return names


def remove_session(storage: Storage, session_id: SessionId) -> None:
    """Remove the files of a session that no pack or snapshot uses."""
    for name, _, _ in list(storage.list(f"{SESSIONS}/{session_id.hex()}")):
        storage.delete(name)


def read_session(
    storage: Storage,
    session_id: SessionId,
    repository: bytes,
    identities: Sequence[AgeIdentity],
    use_gpg: bool,
) -> WriteSession:
    """Decrypt a session with the first of its files that the identities or the user's GPG keys decrypt.

    Raise KeyMissingError where none can be decrypted, SessionError where the files are missing or damaged.
    """
    label = f"session {short_id(session_id)}"
    closed: KeyMissingError | None = None
    damaged: SessionError | None = None
    for data, suffix in _intact_files(storage, session_id):
        try:
            if isinstance(data, SessionError):
                raise data
            if suffix == "age" and identities:
                return decode_session(age.unwrap(data, identities), session_id, repository)
            if suffix == "gpg" and use_gpg:
                return decode_session(gpg.unwrap(data), session_id, repository)
            closed = closed or KeyMissingError(f"{label} cannot be decrypted")
        except KeyMissingError as error:
            closed = error
        except SessionError as error:
            damaged = error
    if closed is not None and (damaged is None or not identities):
        raise KeyMissingError(_join_reasons(identities, use_gpg)) from closed
    raise damaged or SessionError(
        f"{label} is missing: its packs and snapshots can no longer be decrypted"
    )


def _intact_files(
    storage: Storage, session_id: SessionId
) -> Iterator[tuple[bytes | SessionError, str]]:
    """Yield the content of each file of a session, or the error that it is damaged; the smallest first.

    Raise SessionError where the limits leave some unread.
    """
    files = []
    for name, size, _ in storage.list(f"{SESSIONS}/{session_id.hex()}"):
        suffix = name.rpartition(".")[2]
        if suffix in ("age", "gpg"):
            files.append((suffix, size, name))
    read_bytes = 0
    # The age files first: GPG may ask the user.
    for number, (suffix, size, name) in enumerate(sorted(files)):
        read_bytes += min(size, _MAX_FILE_BYTES)
        if number >= MAX_READ_FILES or read_bytes > MAX_READ_BYTES:
            raise SessionError(
                f"session {short_id(session_id)} has {len(files)} files, more than are read; remove those "
                f"of {SESSIONS}/{session_id.hex()} that no machine of yours has written"
            )
        try:
            data = storage.read(name, 0, _MAX_FILE_BYTES)
        except NotFoundError:
            continue
        stem = name.rpartition("/")[2].partition(".")[0]
        if digest_of(data).hex() == stem:
            yield data, suffix
        else:
            yield SessionError(f"{name} is damaged: digest mismatch"), suffix


def _join_reasons(identities: Sequence[AgeIdentity], use_gpg: bool) -> str:
    if identities or use_gpg:
        return "none of the given identities decrypts this: it was stored for other recipients"
    return f"the repository {NOTHING_GIVEN}"
