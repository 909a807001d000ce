"""Recipients: the public keys to which new sessions are encrypted; a public list in the repository.

After a removal the list also has the records of the domains that replaced the first one
(`casfs.format.generation`), so that one durable step removes a recipient and replaces the domain.

The storage could add itself to that list. So a machine that writes remembers the list
(`casfs.crypto.trust_state`) and refuses a changed list until the user accepts it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from casfs.crypto import age, gpg, openpgp
from casfs.digest import digest_of
from casfs.errors import IntegrityError, NotFoundError, WrongKeyError
from casfs.format.generation import Generation, require_valid
from casfs.json_document import InvalidJsonError, parse_json
from casfs.storage.base import Storage

RECIPIENTS_NAME = "recipients"
_MAX_BYTES = 4 << 20
_FIRST_LINE = b"casfs recipients 1\n"
_FIRST_LINE_WITH_GENERATIONS = b"casfs recipients 2\n"
_FIRST_LINES = (_FIRST_LINE, _FIRST_LINE_WITH_GENERATIONS)
_LAST_LINE = re.compile(rb"\nblake3 ([0-9a-f]{64})\n\Z")
_VALUE = re.compile(r"[!-~]+( [!-~]+)?")


class RecipientKind(StrEnum):
    """The kind of key that decrypts for a recipient."""

    AGE = "age"
    SSH = "ssh"
    GPG = "gpg"
    PASSPHRASE = "passphrase"


class Recipient(msgspec.Struct, frozen=True):
    """A recipient.

    `value` identifies it to users: an age or SSH public key, a fingerprint, or for a passphrase the public
    key of its identity. Only a GPG key has the other fields: `age` is the public key of its identity in the
    repository, and `key` is the exported key, from which the fingerprint follows.
    """

    kind: RecipientKind
    value: str
    age: str = ""
    key: bytes = b""

    @property
    def public_key(self) -> str:
        """The recipient's public key in age's form."""
        return self.age if self.kind == RecipientKind.GPG else self.value

    @property
    def keys(self) -> frozenset[str]:
        """Every key that decrypts for the recipient: the one in age's form, and a GPG fingerprint."""
        return frozenset({self.value, self.public_key} - {""})

    @property
    def line(self) -> str:
        """The recipient as a line of a file of recipients: every key that sessions are encrypted to."""
        return f"{self.value} {self.age}" if self.age else self.value


@dataclass(frozen=True, slots=True)
class RecipientList:
    """The repository's list as one read of it returned it: its bytes, verified, and what they mean.

    A process reads the list once and works with this value. `digest` is the hexadecimal BLAKE3 of the
    bytes, by which a machine pins the list. `generations` are the records of replaced domains, in order.
    """

    data: bytes
    recipients: tuple[Recipient, ...]
    generations: tuple[Generation, ...] = ()

    @classmethod
    def of(
        cls, recipients: Sequence[Recipient], generations: Sequence[Generation] = ()
    ) -> RecipientList:
        """Return the list of the given recipients; raise WrongKeyError for more than age files may have."""
        if len(recipients) > age.MAX_RECIPIENTS:
            raise WrongKeyError(
                f"there are {len(recipients)} recipients; the limit is {age.MAX_RECIPIENTS}"
            )
        data = encode_recipients(recipients, generations)
        return cls(data, tuple(recipients), tuple(generations))

    @property
    def digest(self) -> str:
        """The hexadecimal digest of the bytes."""
        return digest_of(self.data).hex()


def parse_recipient(text: str) -> Recipient:
    """Return the recipient of a text: `age1…`, `ssh-ed25519 …`, or a GPG key of the user's keyring.

    A GPG key may be followed by the age key that `casfs key list` prints with it; a recipient that is new
    in a repository gets that key from `add_gpg`. Raise WrongKeyError.
    """
    text = text.strip()
    if text.startswith("age1"):
        return Recipient(RecipientKind.AGE, age.canonical_recipient(text))
    if text.startswith("ssh-"):
        return Recipient(RecipientKind.SSH, age.canonical_recipient(text))
    if text.upper().startswith("AGE-SECRET-KEY-"):
        raise WrongKeyError("that is a secret identity, not a recipient; give its public key")
    name, _, age_key = text.removeprefix("gpg:").partition(" ")
    if age_key:
        age_key = age.canonical_recipient(age_key)
    if not gpg.looks_like_key(name):
        raise WrongKeyError(
            f"{text!r} is not a recipient: give an age or SSH public key, or the id of a GPG key"
        )
    fingerprint, key = gpg.public_key(name)
    return Recipient(RecipientKind.GPG, fingerprint, age_key, key)


def parse_recipients_file(data: bytes, name: str) -> list[Recipient]:
    """Return the recipients in a file's bytes, one a line, `#` begins a comment; raise WrongKeyError."""
    found = []
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise WrongKeyError(f"{name} is not a file of recipients: it is not text") from error
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            try:
                found.append(parse_recipient(line))
            except WrongKeyError as error:
                raise WrongKeyError(f"{name}, line {number}: {error}") from error
    if not found:
        raise WrongKeyError(f"{name} contains no recipient")
    return found


class _WithGenerations(msgspec.Struct, frozen=True):
    """The JSON of a list after the first domain was replaced."""

    recipients: list[Recipient]
    generations: list[Generation]


def encode_recipients(
    recipients: Sequence[Recipient], generations: Sequence[Generation] = ()
) -> bytes:
    """Return the bytes of the file."""
    if generations:
        document = _WithGenerations(list(recipients), list(generations))
        first, encoded = _FIRST_LINE_WITH_GENERATIONS, msgspec.json.encode(document)
    else:
        first, encoded = _FIRST_LINE, msgspec.json.encode(recipients)
    text = first + msgspec.json.format(encoded, indent=1)
    return text + b"\nblake3 %s\n" % digest_of(text).hex().encode()


def decode_recipients(data: bytes) -> RecipientList:
    """Parse the bytes of the file; raise IntegrityError for a damaged file."""
    last = _LAST_LINE.search(data)
    first = next((one for one in _FIRST_LINES if data.startswith(one)), None)
    if first is None or last is None or digest_of(data[: last.start()]).hex().encode() != last[1]:
        raise IntegrityError("the repository's list of recipients is damaged")
    found: list[Recipient]
    generations: list[Generation] = []
    encoded = data[len(first) : last.start()]
    try:
        if first == _FIRST_LINE:
            found = parse_json(encoded, list[Recipient])
        else:
            document = parse_json(encoded, _WithGenerations)
            found, generations = document.recipients, document.generations
        require_valid(generations)
    except (InvalidJsonError, IntegrityError) as error:
        raise IntegrityError(f"the repository's list of recipients is damaged: {error}") from error
    try:
        for one in found:
            _require_bound(one)
    except WrongKeyError as error:
        # The text is not quoted: a hostile storage must not write control characters to a terminal.
        raise IntegrityError(
            f"the repository's list of recipients is damaged: it has an invalid recipient: {error}"
        ) from error
    return RecipientList(data, tuple(found), tuple(generations))


def _require_bound(recipient: Recipient) -> None:
    """Raise WrongKeyError unless a recipient's printed value determines the keys that are encrypted to.

    `age` of a GPG key is the exception: it is printed with the fingerprint and compared with it.
    """
    if not _VALUE.fullmatch(recipient.value):
        raise WrongKeyError("its value is not printable")
    if recipient.kind == RecipientKind.GPG:
        if openpgp.fingerprint(recipient.key) != recipient.value:
            raise WrongKeyError("the GPG key has another fingerprint")
    elif recipient.age or recipient.key:
        raise WrongKeyError(f"a recipient of kind {recipient.kind} has the keys of a GPG key")
    key = recipient.public_key
    if key.startswith("ssh-") != (recipient.kind == RecipientKind.SSH):
        raise WrongKeyError(f"the public key is not one of kind {recipient.kind}")
    if not _VALUE.fullmatch(key) or age.canonical_recipient(key) != key:
        raise WrongKeyError("the public key is not in its usual form")


def read_recipients(storage: Storage) -> RecipientList:
    """Return the repository's recipients; raise IntegrityError and StorageError."""
    try:
        data = storage.read(RECIPIENTS_NAME, 0, _MAX_BYTES)
    except NotFoundError as error:
        raise IntegrityError("the repository's list of recipients is missing") from error
    return decode_recipients(data)


def write_recipients(storage: Storage, recipients: RecipientList) -> None:
    """Replace the list durably."""
    storage.write(RECIPIENTS_NAME, recipients.data)


def wrap(data: bytes, recipients: Iterable[Recipient]) -> list[tuple[str, bytes]]:
    """Return the files that the recipients decrypt, each with its suffix.

    One for age, and one for GPG keys.
    """
    all_recipients = list(recipients)
    files = [("age", age.wrap(data, [one.public_key for one in all_recipients]))]
    keys = [one.key for one in all_recipients if one.kind == RecipientKind.GPG]
    if keys:
        files.append(("gpg", gpg.wrap(data, keys)))
    return files


def merged(now: Sequence[Recipient], more: Iterable[Recipient]) -> list[Recipient]:
    """Return a list with further recipients added, each once."""
    found = {one.value: one for one in now}
    for one in more:
        found.setdefault(one.value, one)
    return list(found.values())
