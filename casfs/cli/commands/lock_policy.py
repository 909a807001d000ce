"""The command lock-policy: for how long the objects of a repository are locked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casfs.cli.options import common_options
from casfs.cli.output import Output, format_time, iso_time
from casfs.cli.param_types import DURATION
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.display import format_duration
from casfs.errors import UsageError

if TYPE_CHECKING:
    from casfs.crypto.trust_root import TrustRoot
    from casfs.format.key_derivation import DedupDomain
    from casfs.format.lock_policy import LockPolicy
    from casfs.repository.place import Place
    from casfs.storage.base import Storage
    from casfs.storage.bucket import BucketSettings


@click.command("lock-policy", cls=Verb)
@click.option(
    "--lock-for",
    "lock_for_s",
    type=DURATION,
    metavar="DURATION",
    help="Lock what a new snapshot needs for this long, as in 30d.",
)
@click.option("--off", is_flag=True, help="Lock nothing more; existing locks last until they end.")
@common_options
@click.pass_obj
def lock_policy(settings: Settings, lock_for_s: int | None, off: bool) -> None:
    """Show or change how long objects in a bucket are locked.

    Each backup locks what its snapshot needs for at least this long, in S3's COMPLIANCE mode: until then no
    credential can remove it or shorten the lock. The bucket must have been made with object lock. A host with
    the secret of an encrypted repository follows a change by itself; on others run `casfs key accept`.
    """
    from casfs.repository.lock_policy import find_policy, require_locking_bucket, set_policy

    if off and lock_for_s is not None:
        raise UsageError("--lock-for and --off exclude each other; give one of them")
    place = settings.repository()
    storage = place.open_storage()
    try:
        trust = place.trust_root(storage)
        bucket = require_locking_bucket(storage)
        wanted_s = 0 if off else lock_for_s
        if wanted_s is not None:
            require_lock_duration(wanted_s, off)
            domain = _own_domain(settings, place, storage, trust)
            set_policy(storage, trust.config, wanted_s, domain)
        found = find_policy(storage, trust.config)
        _print(settings.output(), found.policy if found is not None else None, bucket.settings())
    finally:
        storage.close()


def require_lock_duration(lock_for_s: int, off: bool = False) -> None:
    """Raise UsageError for a time that is too short or too long; `off` allows 0."""
    from casfs.format.lock_policy import MAX_LOCK_S

    if not lock_for_s and not off:
        raise UsageError("--lock-for 0 locks nothing; use `casfs lock-policy --off`")
    if lock_for_s > MAX_LOCK_S:
        raise UsageError(
            f"--lock-for is at most {format_duration(MAX_LOCK_S)}: a lock cannot be taken back"
        )


def _own_domain(
    settings: Settings, place: Place, storage: Storage, trust: TrustRoot
) -> DedupDomain | None:
    """Return the repository's own domain, which an identity gives where this machine does not know it."""
    from casfs.repository.lock_policy import own_domain

    domain = own_domain(trust.config)
    if domain is None and trust.config.encryption is not None:
        from casfs.crypto.key_manager import KeyManager

        identities = settings.unlock(storage, trust)
        if identities:
            KeyManager.for_writing(str(place), storage, trust, identities)
            domain = own_domain(trust.config)
    return domain


def _print(output: Output, policy: LockPolicy | None, bucket: BucketSettings) -> None:
    if policy is None or not policy.lock_for_s:
        output.line("new objects are not locked by casfs")
    else:
        output.line(
            f"what a new snapshot needs is locked for {format_duration(policy.lock_for_s)}, "
            f"decided {format_time(policy.set_ns)}"
        )
    if bucket.default_lock_s is not None:
        output.line(
            f"the bucket locks every new object for {format_duration(bucket.default_lock_s)}"
        )
    output.emit(
        "lock_policy",
        lock_for_seconds=policy.lock_for_s if policy is not None else 0,
        set=iso_time(policy.set_ns) if policy is not None else None,
        bucket_default_seconds=bucket.default_lock_s,
    )
