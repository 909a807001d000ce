"""The one tree of exceptions: attributes hold the data, `str()` makes the sentence.

`exit_code` is what the command line returns when the error ends a command (see the contract of the
command line: 1 failed, 2 usage, 5 damage found, 6 locked).
"""

from __future__ import annotations

from typing import ClassVar

from casfs.digest import short_id


class CasfsError(Exception):
    """Something that casfs can explain; a user sees its sentence and no traceback."""

    exit_code: ClassVar[int] = 1


class UsageError(CasfsError):
    """The command was asked for something that it cannot mean."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file cannot be used as it is.

    `line` is None where the file as a whole is meant, `key` the dotted key or "" where none is.
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
    """Something stands already where something new was to be made."""


class RefusedError(CasfsError):
    """What was asked for would destroy the repository, or store it in itself."""


class NotFoundError(CasfsError):
    """A repository, snapshot, path or mountpoint that was named is not there."""


class AmbiguousIdError(CasfsError):
    """A prefix fits several snapshots."""

    def __init__(self, prefix: str, matches: list[str]) -> None:
        super().__init__(prefix, matches)
        self.prefix = prefix
        self.matches = matches

    def __str__(self) -> str:
        shown = ", ".join(match[:12] for match in self.matches[:5])
        more = ", …" if len(self.matches) > 5 else ""
        return (
            f"snapshot id prefix {self.prefix!r} is ambiguous: it fits {len(self.matches)} snapshots "
            f"({shown}{more}); give more digits"
        )


class FormatError(CasfsError):
    """The repository has a format that this version does not read."""


class KeyMissingError(CasfsError):
    """What is encrypted cannot be opened with the identities that were given."""


class WrongKeyError(CasfsError):
    """A passphrase is wrong, or an identity or a recipient is not what it should be."""


class TrustError(CasfsError):
    """A repository is not the one, or has not the recipients, that this machine knows."""


class LockedError(CasfsError):
    """Another process holds the repository against this."""

    exit_code = 6


class StorageError(CasfsError):
    """The storage refused: disk full, I/O error, permission."""

    def __init__(self, action: str, path: str, cause: OSError) -> None:
        super().__init__(action, path, cause)
        self.action = action
        self.path = path
        self.cause = cause

    def __str__(self) -> str:
        return f"cannot {self.action} {self.path}: {self.cause.strerror or self.cause}"


class StorageDeniedError(StorageError):
    """The storage refuses who asks: credentials, rights, or a key of the server that does not fit.

    Asking again does not help.
    """


class StorageUnavailableError(StorageError):
    """The storage did not answer, or is too busy; what was asked may or may not have happened."""


class IndexUnusableError(CasfsError):
    """The index cannot be used; it is derived and can be rebuilt from the packs."""


class IndexDamagedError(IndexUnusableError):
    """LMDB has found that its file contradicts itself."""


class IntegrityError(CasfsError):
    """What is stored is not what its digest says."""

    exit_code = 5


class BlobError(IntegrityError):
    """One blob is damaged or missing.

    `digest` is the blob's, `pack` the name of the pack that should hold it (None when the index
    knows of none), `reason` a clause in plain words.
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
    """A pack cannot be parsed or is not what its name says."""

    def __init__(self, pack: bytes, reason: str) -> None:
        super().__init__(pack, reason)
        self.pack = pack
        self.reason = reason

    def __str__(self) -> str:
        return f"pack {short_id(self.pack)}: {self.reason}"


class SessionError(IntegrityError):
    """A session's wrapped keys are missing, damaged, or not what their name says.

    What was stored in that session cannot be decrypted.
    """


class TreeError(IntegrityError):
    """A tree, a content list or a snapshot verified but does not keep the rules of its format."""


class NotRegularError(Exception):
    """The name no longer means a regular file."""


class ReflinkError(OSError):
    """A file cannot be cloned although that is required."""
