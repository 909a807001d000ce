"""The exceptions of casfs: attributes hold the data, `str()` returns the message.

`exit_code` is the exit code of a command that the error ends: 1 failed, 2 usage error, 5 damage found,
6 locked.
"""

from __future__ import annotations

from typing import ClassVar

from casfs.digest import short_id


class CasfsError(Exception):
    """An expected error; the user sees its message and no traceback."""

    exit_code: ClassVar[int] = 1


class UsageError(CasfsError):
    """The arguments of a command are invalid or contradict each other."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file is invalid.

    `line` is None where the error concerns the whole file; `key` is the dotted key, or "" without a key.
    """

    def __init__(self, file: str, line: int | None, key: str, reason: str) -> None:
        super().__init__(file, line, key, reason)
        self.file = file
        self.line = line
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.key, self.reason) if part)


class ExistsError(CasfsError):
    """The object to create already exists."""


class RefusedError(CasfsError):
    """The command is valid but refused, because it would destroy data or back up a repository into itself."""


class NotFoundError(CasfsError):
    """A named repository, snapshot, path or mountpoint does not exist."""


class NoHomeError(CasfsError):
    """This user has no home folder, and no variable names a folder instead."""


class AmbiguousIdError(CasfsError):
    """A prefix matches several snapshots."""

    def __init__(self, prefix: str, matches: list[str]) -> None:
        super().__init__(prefix, matches)
        self.prefix = prefix
        self.matches = matches

    def __str__(self) -> str:
        shown = ", ".join(match[:12] for match in self.matches[:5])
        more = ", …" if len(self.matches) > 5 else ""
        return (
            f"snapshot id prefix {self.prefix!r} is ambiguous: it matches {len(self.matches)} snapshots "
            f"({shown}{more}); give more digits"
        )


class FormatError(CasfsError):
    """The repository has a format version that this version of casfs cannot read."""


class KeyMissingError(CasfsError):
    """None of the given identities can decrypt the data."""


class WrongKeyError(CasfsError):
    """A passphrase is wrong, or an identity or recipient is invalid."""


class TrustError(CasfsError):
    """A repository differs from the one that this machine trusts, in its identity or its recipients."""


class LockedError(CasfsError):
    """Another process holds a conflicting lock on the repository."""

    exit_code = 6


class StorageError(CasfsError):
    """A storage operation failed: disk full, I/O error, missing permission."""

    def __init__(self, action: str, path: str, cause: OSError) -> None:
        super().__init__(action, path, cause)
        self.action = action
        self.path = path
        self.cause = cause

    def __str__(self) -> str:
        return f"cannot {self.action} {self.path}: {self.cause.strerror or self.cause}"


class NotPublishedError(StorageError):
    """The storage failed during a backup to `place`, before its snapshot was published."""

    def __init__(self, place: str, error: StorageError | StorageUnavailableError) -> None:
        super().__init__(error.action, error.path, error.cause)
        self.args = (place, error)
        self.place = place

    def __str__(self) -> str:
        return f"{super().__str__()}; nothing was published in the repository {self.place}"


class PacksRemovedError(CasfsError):
    """Another host removed packs that a new snapshot needs, and their data cannot be read elsewhere."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(place, reason)
        self.place = place
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"data that the new snapshot needs was removed from {self.place} meanwhile ({self.reason}); "
            "nothing was published. Run the command again: what it stored is used"
        )


class StorageDeniedError(StorageError):
    """The storage denies access: wrong credentials, missing permission, or an unexpected host key.

    Retrying does not help.
    """


class StorageUnavailableError(CasfsError):
    """The storage did not answer, or is too busy; the request may or may not have taken effect.

    Not a StorageError: a network that is down says nothing about what is stored, so no command counts
    this as damage or continues without the data.
    """

    def __init__(self, action: str, path: str, cause: OSError) -> None:
        super().__init__(action, path, cause)
        self.action = action
        self.path = path
        self.cause = cause

    def __str__(self) -> str:
        return f"cannot {self.action} {self.path}: {self.cause.strerror or self.cause}"


class PublicationUnknownError(StorageUnavailableError):
    """The storage did not answer when a snapshot was stored, which may have taken effect."""

    def __init__(self, error: StorageUnavailableError) -> None:
        super().__init__(error.action, error.path, error.cause)

    def __str__(self) -> str:
        return (
            f"{super().__str__()}; the snapshot may have been published all the same: `casfs snapshots` "
            "shows it then"
        )


class IndexUnusableError(CasfsError):
    """The index cannot be used. It is derived data and can be rebuilt from the packs."""


class IndexDamagedError(IndexUnusableError):
    """LMDB reports that its file is corrupt."""


class IntegrityError(CasfsError):
    """Stored data is damaged, missing, or contradicts its digest."""

    exit_code = 5


class BlobError(IntegrityError):
    """A blob is damaged or missing.

    `digest` is the blob's digest, `pack` the name of the pack that should hold it (None where the index has
    none), `reason` a clause of a message.
    """

    def __init__(self, digest: bytes, reason: str, pack: bytes | None = None) -> None:
        super().__init__(digest, reason, pack)
        self.digest = digest
        self.reason = reason
        self.pack = pack

    def __str__(self) -> str:
        place = f" in pack {short_id(self.pack)}" if self.pack is not None else ""
        return f"blob {short_id(self.digest)}{place}: {self.reason}"


class PackError(IntegrityError):
    """A pack cannot be parsed, or does not match the digest in its name."""

    def __init__(self, pack: bytes, reason: str) -> None:
        super().__init__(pack, reason)
        self.pack = pack
        self.reason = reason

    def __str__(self) -> str:
        return f"pack {short_id(self.pack)}: {self.reason}"


class DeltaError(IntegrityError):
    """An index delta cannot be parsed, or does not match its name. It is derived data."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class SessionError(IntegrityError):
    """The wrapped keys of a session are missing, damaged, or do not match the digest in their name.

    Data that was stored in the session cannot be decrypted.
    """


class TreeError(IntegrityError):
    """A tree, a content list or a snapshot has the right digest but violates its format."""


class NotRegularError(Exception):
    """The name no longer refers to a regular file."""


class ReflinkError(OSError):
    """A file cannot be cloned, although the options require a clone."""
