"""Remove recipients, and replace the repository's own dedup domain, which they know.

The steps, each durable before the next:

1. A session with the new domain is stored, encrypted to the recipients that are left.
2. The list of the snapshots and drafts that exist is stored: these stay proven.
3. In a bucket with a lock policy, the policy is stored again, with a code of the new domain.
4. The list of recipients is replaced: it lacks the removed ones and has the record of the new domain.
5. This machine remembers the new list and writes in the new domain.

Before step 4 nothing has changed for anybody: what the first steps stored stays unused, and a prune removes
the session. After step 4 the removal is complete; if this machine died before step 5, it refuses the new list
until `casfs key accept`, as all others do. What is published in the old domain after step 2 is unproven.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from casfs.crypto.identities import Identities
from casfs.crypto.key_manager import KeyManager, require_any_recipient, verify_trusted
from casfs.crypto.recipients import Recipient
from casfs.crypto.session_files import write_session
from casfs.crypto.trust_root import TrustRoot
from casfs.errors import RefusedError
from casfs.format.generation import FOLDER as DOMAINS
from casfs.format.generation import Generation, encode_snapshot_list, new_generation
from casfs.format.key_derivation import DedupDomain, WriteSession
from casfs.repository.lock_policy import own_domain, renew_policy
from casfs.repository.snapshot_listing import DRAFTS, SNAPSHOTS, list_ids
from casfs.storage.base import Storage


def knows_own_domain(root: Path | str, storage: Storage, trust: TrustRoot) -> bool:
    """Return whether this machine can replace the domain without an identity.

    Raise TrustError where the recipients differ from those that this machine trusts.
    """
    verify_trusted(root, storage, trust)
    return own_domain(trust.config) is not None


def remove_recipients(
    root: Path | str,
    storage: Storage,
    trust: TrustRoot,
    left: Sequence[Recipient],
    identities: Identities,
) -> Generation:
    """Make `left` the recipients and replace the repository's own domain; return the record of the new one.

    Raise UsageError where no recipient is left, TrustError where the recipients differ from those that this
    machine trusts, and RefusedError where it does not know the domain that is to be replaced.
    """
    require_any_recipient(left)
    if not (identities or knows_own_domain(root, storage, trust)):
        raise _refusal("no identity was given and this machine has no copy of it")
    keys = KeyManager.for_writing(root, storage, trust, identities)
    before, signing_key = keys.domain, keys.signing_key
    if before is None or signing_key is None or not keys.is_trusted_writer:
        raise _refusal("the given identities do not decrypt it")
    after = DedupDomain.new(before.repository)
    session = WriteSession.new([after, before, *keys.earlier_domains], trust.config.chunker)
    write_session(storage, session, left)
    snapshots, data = encode_snapshot_list(
        snapshot for folder in (SNAPSHOTS, DRAFTS) for snapshot in list_ids(storage, folder)
    )
    # Others can predict the name, and may have stored something else under it.
    storage.write(f"{DOMAINS}/{snapshots}", data)
    renew_policy(storage, trust.config, after)
    generations = trust.recipients(storage).generations
    record = new_generation(len(generations) + 1, before, session, snapshots, signing_key)
    trust.replace_recipients(storage, left, (*generations, record))
    keys.use_domain(after, trust.recipients(storage))
    return record


def _refusal(reason: str) -> RefusedError:
    return RefusedError(
        "a removal also replaces the repository's secret, by which a former recipient would recognize known "
        f"content, and {reason}: give --identity FILE or a passphrase; nothing was changed"
    )
