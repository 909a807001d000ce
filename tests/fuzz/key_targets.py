"""Keys and trust: recipients, sessions, identities, and what this machine remembers of repositories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

from casfs.crypto import age, gpg, openpgp, trust_state, writers
from casfs.crypto.passphrase import parse_wrapped
from casfs.crypto.recipients import (
    Recipient,
    RecipientKind,
    decode_recipients,
    encode_recipients,
    parse_recipients_file,
)
from casfs.crypto.session_files import decode_session, encode_session
from casfs.crypto.trust_root import TrustRoot
from casfs.digest import digest_of
from casfs.errors import (
    IntegrityError,
    KeyMissingError,
    SessionError,
    TrustError,
    WrongKeyError,
)
from casfs.format.config import RepositoryConfig, encode_config
from casfs.index import fingerprint
from casfs.index.fingerprint import FINGERPRINT_FILE
from tests.fuzz.target import Target, real_objects
from tests.support.encryption import (
    GENERATION,
    GPG_FINGERPRINT,
    GPG_KEY,
    OTHER_PUBLIC,
    PUBLIC,
    REPOSITORY,
    SECRET,
    SESSION,
)

IDENTITY = age.identity_from_line(SECRET)
CONFIG = RepositoryConfig(id=REPOSITORY.hex(), created="2026-11-28")
_INDEX_KEY = bytes(32)


def _recipients(data: bytes) -> None:
    """Decode a list whose digest fits."""
    for file in (data, data + b"\nblake3 %s\n" % digest_of(data).hex().encode()):
        try:
            found = decode_recipients(file)
        except IntegrityError:
            continue
        again = decode_recipients(encode_recipients(found.recipients, found.generations))
        assert (again.recipients, again.generations) == (found.recipients, found.generations)


def _recipient_lists() -> list[bytes]:
    some = [
        Recipient(RecipientKind.AGE, PUBLIC),
        Recipient(RecipientKind.GPG, GPG_FINGERPRINT, OTHER_PUBLIC, GPG_KEY),
    ]
    replaced = encode_recipients(some, [GENERATION])
    lists = [encode_recipients(some), replaced, *real_objects("*/recipients")]
    return [one[: one.rindex(b"\nblake3 ")] for one in lists]


def _recipients_file(data: bytes) -> None:
    # GnuPG is another program, and knows no such key.
    with mock.patch.object(gpg, "public_key", side_effect=WrongKeyError("no such key")):
        parse_recipients_file(data, "file")


def _session(data: bytes) -> None:
    session = decode_session(data, SESSION.id, REPOSITORY)
    assert decode_session(encode_session(session), SESSION.id, REPOSITORY) == session


def _wrapped_identity(data: bytes) -> None:
    wrapped = parse_wrapped(data, "identity")
    assert wrapped.memory_kib <= 1 << 20 and wrapped.iterations * wrapped.lanes <= 4096


def _identity_file(data: bytes) -> None:
    if b"scrypt" not in data and b"bcrypt" not in data:  # these cost what they say
        age.identities_of_file(data, "identities", lambda _: "passphrase")


def _age_file(data: bytes) -> None:
    age.unwrap(data, [IDENTITY])


def _state(write: Callable[[bytes], Path], read: Callable[[], object]) -> Callable[[bytes], None]:
    """Return what writes its input as a file of this user's state and reads it."""

    def parse(data: bytes) -> None:
        path = write(data)
        try:
            read()
        finally:
            path.unlink(missing_ok=True)

    return parse


def _at(path: Callable[[], Path]) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        found = path()
        found.write_bytes(data)
        return found

    return write


def _trust(config: RepositoryConfig) -> TrustRoot:
    return TrustRoot(encode_config(config), "here")


def _fingerprint(data: bytes) -> None:
    """Read a fingerprint with a right code, and one without."""
    folder = trust_state.state_folder()
    line = data.decode("utf-8", "replace").replace("\n", "")
    code = fingerprint._code(_INDEX_KEY, line)
    for text in (data, f"{line} {code}\n".encode()):
        (folder / FINGERPRINT_FILE).write_bytes(text)
        found = fingerprint._read_fingerprint(folder, _INDEX_KEY)
        assert found is None or len(found) == 3
    fingerprint._is_marked_damaged(folder)


def _hex(count: int) -> str:
    return bytes(count).hex()


def _state_seeds() -> list[bytes]:
    repository = REPOSITORY.hex()
    return [
        f'{{"repository":"{repository}","domain":"{_hex(32)}","recipients":"{_hex(32)}",'
        f'"last_snapshot":"","last_time_ns":5,"signing_seed":"{_hex(32)}"}}'.encode(),
        f'{{"repository":"{repository}","hosts":{{"a":["{_hex(32)}"]}},"unsigned":["{_hex(32)}"]}}'.encode(),
        f'{{"path":"/r","repository":"{repository}","domain":"","config":"","format":1}}'.encode(),
        f'{{"casfs":"lock policy 1","repository":"{repository}","lock_for_s":5,"set_ns":5}}'.encode(),
    ]


TARGETS = [
    Target("recipients", _recipients, _recipient_lists, ()),
    Target(
        "recipients file",
        _recipients_file,
        lambda: [
            f"# ours\n{PUBLIC}\n{OTHER_PUBLIC}\n".encode(),
            f"{GPG_FINGERPRINT} {PUBLIC}\nssh-ed25519 AAAA x\n".encode(),
        ],
        (WrongKeyError,),
    ),
    Target("session document", _session, lambda: [encode_session(SESSION)], (SessionError,)),
    Target(
        "passphrase identity",
        _wrapped_identity,
        lambda: real_objects("*/identities/*.json"),
        (SessionError,),
    ),
    Target(
        "identity file",
        _identity_file,
        lambda: [SECRET.encode(), *real_objects("encrypted-v*.age", "encrypted-v*.ssh")],
        (WrongKeyError, KeyMissingError),
        cost=4,
    ),
    Target(
        "age file",
        _age_file,
        lambda: [age.wrap(b"secret", [PUBLIC, OTHER_PUBLIC]), *real_objects("*/sessions/*/*.age")],
        (SessionError, KeyMissingError),
        cost=8,
    ),
    Target("OpenPGP key", openpgp.fingerprint, lambda: [GPG_KEY], (WrongKeyError,)),
    Target(
        "state of a writer",
        _state(
            _at(lambda: trust_state._state_path(CONFIG.id)), lambda: trust_state.load_state(CONFIG)
        ),
        _state_seeds,
        (TrustError,),
        cost=4,
    ),
    Target(
        "state of trusted machines",
        _state(_at(lambda: writers._path(CONFIG.id)), lambda: writers.TrustedWriters(CONFIG)),
        _state_seeds,
        (TrustError,),
        cost=4,
    ),
    Target(
        "pinned lock policy",
        _state(
            _at(lambda: trust_state._lock_policy_path(CONFIG.id)),
            lambda: trust_state.pinned_lock_policy(CONFIG.id),
        ),
        _state_seeds,
        (TrustError,),
        cost=4,
    ),
    Target(
        "pin of a place",
        _state(
            _at(lambda: trust_state._pin_path("s3://here")),
            lambda: trust_state.verify_pin("s3://here", _trust(CONFIG)),
        ),
        _state_seeds,
        (TrustError,),
        cost=4,
    ),
    Target(
        "fingerprint of the index",
        _fingerprint,
        lambda: [f"casfs index seal 2: 4096 17 {_hex(32)}".encode()],
        (),
        cost=4,
    ),
]
