"""This machine's state of the encrypted repositories that it uses: trust on first use.

One file for each repository contains the secret of the domain in which this machine writes, the digest of the
list of recipients that it trusts, the last snapshot that it published, and the key that signs its snapshots.
Another one has the records of the domains that replaced the first one, as far as this machine has seen them.
One file for each location, the pin, names the repository there and the digest of its configuration. The files
are in the user's state directory, readable only by this user. Their contents decrypt nothing: they reveal
whether a known content is stored, and allow publishing in the name of this machine.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from casfs.atomic_file import replace_file
from casfs.crypto.trust_root import TrustRoot
from casfs.digest import digest_of
from casfs.errors import IntegrityError, NoHomeError, StorageError, TrustError
from casfs.format.config import RepositoryConfig
from casfs.format.generation import Generation, require_valid
from casfs.format.lock_policy import LockPolicy
from casfs.format.versions import OLDEST_FORMAT
from casfs.json_document import InvalidJsonError, parse_json
from casfs.user_dirs import make_private_folder, require_private_folder, user_folder

if TYPE_CHECKING:
    # An unencrypted repository does not need these imports.
    from casfs.format.key_derivation import DedupDomain
    from casfs.format.signature import SigningKey


class WriterState(msgspec.Struct, frozen=True):
    """The state of one repository; `domain` and `recipients` are hexadecimal."""

    repository: str
    domain: str
    recipients: str
    last_snapshot: str = ""
    last_time_ns: int = 0
    signing_seed: str = ""
    """The seed of this machine's signing key, hexadecimal; empty in a state of an earlier version."""
    generation: int = 0
    """How often the repository's domain had been replaced when this machine began to use its own."""
    earlier: tuple[str, ...] = ()
    """The secrets of the domains in which it wrote before the replacements, the newest first."""

    def own_domain(self) -> DedupDomain:
        """Return the domain in which this machine writes."""
        from casfs.format.key_derivation import DedupDomain

        return DedupDomain(bytes.fromhex(self.repository), bytes.fromhex(self.domain))

    def earlier_domains(self) -> list[DedupDomain]:
        """Return the domains in which this machine wrote before the replacements, the newest first."""
        from casfs.format.key_derivation import DedupDomain

        repository = bytes.fromhex(self.repository)
        return [DedupDomain(repository, bytes.fromhex(secret)) for secret in self.earlier]

    def signing_key(self) -> SigningKey:
        """Return the key with which this machine signs its snapshots."""
        from casfs.format.signature import SigningKey

        return SigningKey(bytes.fromhex(self.signing_seed))


class _Generations(msgspec.Struct, frozen=True):
    repository: str
    generations: tuple[Generation, ...]


class _Pin(msgspec.Struct, frozen=True):
    path: str
    repository: str
    domain: str
    config: str = ""
    """`TrustRoot.config_digest`; empty in a pin of an earlier version."""
    format: int = OLDEST_FORMAT


def state_folder(make: bool = True) -> Path:
    """Return the folder of the user's state, created if missing.

    Raise StorageError, and RefusedError where another user can change what is in it.
    """
    folder = user_folder("XDG_STATE_HOME", ".local/state")
    try:
        if make:
            make_private_folder(folder, "XDG_STATE_HOME")
        else:
            require_private_folder(folder, "XDG_STATE_HOME")
    except OSError as error:
        raise StorageError("make the folder", str(folder), error) from error
    return folder


def load_state(config: RepositoryConfig) -> WriterState | None:
    """Return this machine's state of a repository, or None.

    Raise StorageError, and TrustError for a damaged file.
    """
    return _load_state(config.id)


def _load_state(repository: str) -> WriterState | None:
    path = _state_path(repository)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError("read", str(path), error) from error
    from casfs.format.key_derivation import SECRET_BYTES

    try:
        state = parse_json(data, WriterState)
        is_valid = (
            state.repository == repository
            and len(bytes.fromhex(state.domain)) == SECRET_BYTES
            and len(bytes.fromhex(state.signing_seed)) in (0, SECRET_BYTES)
            and all(len(bytes.fromhex(secret)) == SECRET_BYTES for secret in state.earlier)
        )
    except ValueError as error:
        raise _damaged(path) from error
    if not is_valid:
        raise _damaged(path)
    return state


def save_state(state: WriterState) -> None:
    """Store the state durably; raise StorageError."""
    write_state_file(_state_path(state.repository), msgspec.json.encode(state))


def change_state(known: WriterState, change: Callable[[WriterState], WriterState]) -> WriterState:
    """Change this machine's state durably, and return it.

    Another process of this machine may have changed it since this one loaded `known`: a backup that ends must
    not undo a removal of recipients. `known` is changed where there is no file any more. Raise StorageError,
    and TrustError for a damaged file.
    """
    with _state_alone():
        state = change(_load_state(known.repository) or known)
        save_state(state)
    return state


@contextmanager
def _state_alone() -> Iterator[None]:
    """Keep other processes of this user from changing their states, where the file system has locks."""
    folder = state_folder()
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError("open the folder", str(folder), error) from error
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def pin_generations(repository: str, generations: Sequence[Generation]) -> None:
    """Record the replaced domains of a repository (its id); raise StorageError."""
    record = _Generations(repository, tuple(generations))
    write_state_file(_generations_path(repository), msgspec.json.encode(record))


def pinned_generations(repository: str) -> tuple[Generation, ...]:
    """Return the records of replaced domains that this machine has seen.

    Raise StorageError, and TrustError for a damaged file.
    """
    try:
        path = _generations_path(repository, make=False)
    except NoHomeError:
        return ()
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ()
    except OSError as error:
        raise StorageError("read", str(path), error) from error
    try:
        found = parse_json(data, _Generations)
        require_valid(list(found.generations))
    except (InvalidJsonError, IntegrityError) as error:
        raise _damaged(path) from error
    require_of_repository(path, found.repository, repository)
    return found.generations


def pin_lock_policy(policy: LockPolicy) -> None:
    """Record the lock policy that this machine follows in a repository; raise StorageError."""
    write_state_file(_lock_policy_path(policy.repository), msgspec.json.encode(policy))


def pinned_lock_policy(repository: str) -> LockPolicy | None:
    """Return the lock policy that this machine follows in a repository, None before its first use.

    Raise StorageError, and TrustError for a damaged file.
    """
    try:
        path = _lock_policy_path(repository, make=False)
    except NoHomeError:
        return None
    try:
        policy = parse_json(path.read_bytes(), LockPolicy)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StorageError("read", str(path), error) from error
    except InvalidJsonError as error:
        raise _damaged(path) from error
    require_of_repository(path, policy.repository, repository)
    return policy


def pin(root: Path | str, trust: TrustRoot) -> None:
    """Record which repository is at a location, if it or the recorded one is encrypted.

    The record names the configuration by a digest that an upgrade keeps, and the format. Raise StorageError.
    """
    config = trust.config
    names = _location_names(root)
    if config.encryption is None and not _has_pin(names):
        return
    domain = config.encryption.domain if config.encryption is not None else ""
    shown = os.fsencode(root).decode("utf-8", "backslashreplace")
    record = msgspec.json.encode(_Pin(shown, config.id, domain, trust.config_digest, config.format))
    for name in names:
        write_state_file(_pin_path(name), record)


def _has_pin(names: list[str]) -> bool:
    try:
        return any(os.path.exists(_pin_path(name, make=False)) for name in names)
    except NoHomeError:
        return False


def pinned_format(root: Path | str) -> int:
    """Return the newest format that this machine has seen in the repository at a location, 0 if none.

    Raise StorageError, and TrustError for a damaged file.
    """
    try:
        paths = [_pin_path(name, make=False) for name in _location_names(root)]
    except NoHomeError:
        return 0
    places = [place for place in map(_read_pin, paths) if place is not None]
    return max((place.format for place in places), default=0)


def verify_pin(root: Path | str, trust: TrustRoot, is_past: bool = False) -> None:
    """Raise TrustError unless the repository at a location is the encrypted one recorded there before.

    With `is_past` it is the configuration of an earlier time, before an upgrade perhaps: the format may be
    older than the recorded one.
    The location is known by the given path and by the path without symbolic links: neither another
    spelling nor a symbolic link to another folder counts as a first use.
    """
    for name in _location_names(root):
        try:
            path = _pin_path(name, make=False)
        except NoHomeError:
            return  # nothing can have been recorded
        _verify_pin(root, path, trust, is_past)


def _read_pin(path: Path) -> _Pin | None:
    """Return a pin, None where there is none or this user has no state folder."""
    try:
        return parse_json(path.read_bytes(), _Pin)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except OSError as error:
        raise StorageError("read", str(path), error) from error
    except InvalidJsonError as error:
        raise _damaged(path) from error


def _verify_pin(root: Path | str, path: Path, trust: TrustRoot, is_past: bool) -> None:
    place = _read_pin(path)
    if place is None:
        return
    config = trust.config
    domain = config.encryption.domain if config.encryption is not None else ""
    if (place.repository, place.domain) != (config.id, domain):
        what = "an unencrypted one" if config.encryption is None else f"{config.id[:12]}"
        raise TrustError(
            f"the repository in {root} was {place.repository[:12]}, encrypted, and is {what} now: it may "
            "have been replaced. If the change is intended, run `casfs key accept`"
        )
    if place.config not in ("", trust.config_digest):
        raise TrustError(
            f"the configuration of the repository in {root} was changed since this machine last used it, "
            "although casfs never changes it. Compare it with a copy; if it is correct, run "
            "`casfs key accept`"
        )
    if place.format > config.format and not is_past:
        raise TrustError(
            f"the repository in {root} had format {place.format} when this machine last used it, and has "
            f"format {config.format} now: an older copy of its file `config` may have been put back. If that "
            "is intended, run `casfs key accept`"
        )


def _location_names(root: Path | str) -> list[str]:
    """Return the names by which a location is pinned: as given and, for a local path, its real path."""
    name = os.fspath(root)
    if not os.path.isabs(name):
        return [name]
    return list(dict.fromkeys([name, os.path.realpath(name)]))


def _state_path(repository: str) -> Path:
    return state_folder() / f"{repository[:32]}.json"


def _generations_path(repository: str, make: bool = True) -> Path:
    return state_folder(make) / f"domains-{repository[:32]}.json"


def _lock_policy_path(repository: str, make: bool = True) -> Path:
    return state_folder(make) / f"locks-{repository[:32]}.json"


def _pin_path(name: str, make: bool = True) -> Path:
    return state_folder(make) / f"place-{digest_of(os.fsencode(name)).hex()[:32]}.json"


def write_state_file(path: Path, data: bytes) -> None:
    """Replace a file of the state atomically and durably, with mode 0600; raise StorageError."""
    try:
        replace_file(path, data, durable=True)
    except OSError as error:
        raise StorageError("write", str(path), error) from error


def require_of_repository(path: Path, found: str, repository: str) -> None:
    """Raise TrustError unless a file of the state is of a repository; ids are hexadecimal.

    Its name has half of the id. A hostile repository with the same half must not replace what this machine
    knows of the other one.
    """
    if found != repository:
        raise TrustError(
            f"{path} is of the repository {found[:64]!r}, and the id of this one begins alike, {repository}: "
            "one of the two was made to be taken for the other. Do not use that one; if it is the other, "
            "remove the file and run `casfs key accept`"
        )


def _damaged(path: Path) -> TrustError:
    return TrustError(f"{path} is damaged; restore it, or remove it and run `casfs key accept`")
