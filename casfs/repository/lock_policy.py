"""Find and change the lock policy of a repository, and compare it with what this machine knows of it.

The newest valid policy by the storage's clock holds. A hostile storage can hide it, and in a repository
without encryption everyone who may create objects can add another. So a machine pins the policy that it sees
first, and follows a change only if that is authentic and was decided later, or is made on this machine.
Otherwise it keeps to the pinned policy and warns.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from casfs.crypto.trust_state import pin_lock_policy, pinned_lock_policy
from casfs.display import format_duration
from casfs.errors import (
    IntegrityError,
    NoHomeError,
    NotFoundError,
    RefusedError,
    StorageError,
    UsageError,
)
from casfs.format.config import RepositoryConfig
from casfs.format.key_derivation import DedupDomain
from casfs.format.lock_policy import (
    FOLDER,
    MAX_POLICY_BYTES,
    MAX_SET_NS,
    LockPolicy,
    decode_policy,
    encode_policy,
    new_policy,
)
from casfs.storage.base import Storage
from casfs.storage.bucket import Bucket

log = logging.getLogger(__name__)

_MOST_POLICIES = 1000
"""Policies beyond these, the newest, are not read: a host that may create objects could add any number."""


@dataclass(frozen=True, slots=True)
class FoundPolicy:
    """The policy in a storage. `is_authentic` is False where this machine cannot verify it."""

    policy: LockPolicy
    is_authentic: bool


def own_domain(config: RepositoryConfig) -> DedupDomain | None:
    """Return the repository's own domain if this machine knows it, None also without encryption."""
    if config.encryption is None:
        return None
    from casfs.crypto.trust_state import load_state, pinned_generations

    state = load_state(config)
    domain = state.own_domain() if state is not None else None
    generations = pinned_generations(config.id)
    newest = generations[-1].domain if generations else config.encryption.domain
    return domain if domain is not None and domain.id.hex() == newest else None


def find_policy(storage: Storage, config: RepositoryConfig) -> FoundPolicy | None:
    """Return the newest valid policy, None where there is none. Invalid ones are logged and ignored."""
    domain = own_domain(config)
    listed = sorted(storage.list(FOLDER), key=lambda entry: entry.mtime_ns, reverse=True)
    newest: FoundPolicy | None = None
    newest_ns = 0
    for name, _, mtime_ns in listed[:_MOST_POLICIES]:
        if newest is not None and mtime_ns < newest_ns:
            break
        try:
            policy = decode_policy(name, storage.read(name, 0, MAX_POLICY_BYTES), config.id)
            if config.encryption is not None and not policy.code:
                raise IntegrityError(f"{name} is not authentic")
            if domain is not None and not policy.is_authentic(domain.lock_policy_key):
                raise IntegrityError(f"{name} is not authentic")
        except NotFoundError:
            continue
        except IntegrityError as error:
            log.warning("%s; it is ignored", error)
            continue
        # Times of many servers are whole seconds.
        if newest is None or policy.set_ns > newest.policy.set_ns:
            newest, newest_ns = FoundPolicy(policy, domain is not None), mtime_ns
    return newest


def lock_duration_s(storage: Storage, config: RepositoryConfig) -> int:
    """Return for how long a writer locks objects, 0 for not at all; pin what is followed.

    Warn where the storage shows another policy than this machine knows and no proof of the change, and keep
    to the known one: an attacker would shorten the locks, or make them last for years.
    """
    if storage.bucket is None:
        return 0
    found = find_policy(storage, config)
    shown = found.policy if found is not None else new_policy(config.id, 0, 0, None)
    pinned = pinned_lock_policy(config.id)
    if pinned is None or _may_follow(found, pinned):
        if pinned != shown:
            _pin(shown)
        return shown.lock_for_s
    if shown.lock_for_s != pinned.lock_for_s:
        log.warning(
            "the repository shows %s, and this machine knows %s: the policy may have been removed or forged, "
            "so objects are locked as this machine knows it. If the change is meant, run `casfs key accept`",
            _described(shown),
            _described(pinned),
        )
    return pinned.lock_for_s


def _pin(policy: LockPolicy) -> None:
    try:
        pin_lock_policy(policy)
    except (StorageError, NoHomeError) as error:
        log.warning("%s; a change of the lock policy would not be noticed", error)


def _may_follow(found: FoundPolicy | None, pinned: LockPolicy) -> bool:
    return found is not None and found.is_authentic and found.policy.set_ns >= pinned.set_ns


def _described(policy: LockPolicy) -> str:
    if not policy.lock_for_s:
        return "no lock policy"
    return f"a lock policy of {format_duration(policy.lock_for_s)}"


def accept_policy(storage: Storage, config: RepositoryConfig) -> None:
    """Pin the policy that the storage shows, whatever this machine knew before."""
    if storage.bucket is None:
        return
    found = find_policy(storage, config)
    pin_lock_policy(found.policy if found is not None else new_policy(config.id, 0, 0, None))


def set_policy(
    storage: Storage, config: RepositoryConfig, lock_for_s: int, domain: DedupDomain | None
) -> LockPolicy:
    """Store a new policy and pin it; `domain` is the repository's own, None without encryption.

    The policy is decided later than any that is there, whatever the clock of this machine. Raise
    RefusedError for an encrypted repository whose domain is unknown.
    """
    if config.encryption is not None and domain is None:
        raise RefusedError(
            "the lock policy of an encrypted repository is set on a machine with its secret: give --identity "
            "or a passphrase; nothing was changed"
        )
    found = find_policy(storage, config)
    set_ns = _later_than(found.policy if found is not None else None)
    key = domain.lock_policy_key if domain is not None else None
    policy = new_policy(config.id, lock_for_s, set_ns, key)
    storage.create(*encode_policy(policy))
    pin_lock_policy(policy)
    return policy


def _later_than(*policies: LockPolicy | None) -> int:
    """Return now, or a time after all of the policies.

    Where one of them has the last time that a reader accepts, it is that: then the storage's clock decides.
    """
    times = [policy.set_ns + 1 for policy in policies if policy is not None]
    return min(max(time.time_ns(), *times, 0), MAX_SET_NS)


def renew_policy(storage: Storage, config: RepositoryConfig, domain: DedupDomain) -> None:
    """Store the policy again with a code of `domain`, before it becomes the repository's own.

    Until then machines ignore it. Nothing is stored where there is no policy. What is stored is the policy
    that this machine follows: the storage may show an earlier one, or none.
    """
    if storage.bucket is None:
        return
    found, pinned = find_policy(storage, config), pinned_lock_policy(config.id)
    known = [policy for policy in (found.policy if found else None, pinned) if policy is not None]
    if not any(policy.set_ns for policy in known):
        return
    followed = found.policy if found and (pinned is None or _may_follow(found, pinned)) else pinned
    assert followed is not None
    set_ns = _later_than(*known)
    policy = new_policy(config.id, followed.lock_for_s, set_ns, domain.lock_policy_key)
    storage.create(*encode_policy(policy))


def require_locking_bucket(storage: Storage) -> Bucket:
    """Return the bucket of a storage; raise UsageError and RefusedError where it cannot lock objects."""
    bucket = storage.bucket
    if bucket is None:
        raise UsageError(
            f"objects are locked in an S3 bucket, and {storage.url} is none that casfs can lock"
        )
    if not bucket.settings().can_lock:
        raise RefusedError(
            f"the bucket of {storage.url} does not lock objects, which is decided when a bucket is made: "
            "make one with it (aws s3api create-bucket --object-lock-enabled-for-bucket)"
        )
    return bucket
