"""The dedup domain in which this machine writes.

It is the repository's own domain if an identity decrypts that, else the one that this machine has, or a new
one. A domain from before the last removal of a recipient is not used any more, because the former recipient
knows it; the machine keeps its secret to find what it stored with it.
"""

from __future__ import annotations

import logging

import msgspec

from casfs.crypto.generations import require_authentic
from casfs.crypto.keyring import Keyring
from casfs.crypto.trust_state import WriterState, save_state
from casfs.errors import KeyMissingError
from casfs.format.key_derivation import DedupDomain

log = logging.getLogger(__name__)


def state_for_writing(
    state: WriterState | None, keyring: Keyring, recipients_digest: str
) -> WriterState:
    """Return this machine's state with the domain in which it writes, saved if it changed.

    `recipients_digest` is that of the list that a machine without a state trusts from now on. Raise
    TrustError where the list has a forged record of a replaced domain.
    """
    generations = keyring.generations
    number = len(generations.records)
    domain = state.own_domain() if state is not None else None
    is_replaced = state is not None and state.generation < number
    earlier = list(state.earlier) if state is not None else []
    if state is not None:
        generations.learn([state.own_domain(), *state.earlier_domains()])
    if (domain is None or is_replaced or domain.id != generations.newest_id) and keyring.can_read:
        own = _repository_domain(keyring)
        if own is not None:
            domain, is_replaced = own, False
            earlier = [one.secret.hex() for one in generations.earlier()]
    require_authentic(generations)
    if is_replaced:
        assert state is not None
        earlier, domain = [state.domain, *earlier], None
    if domain is None:
        domain = DedupDomain.new(keyring.repository)
        log.warning(_warning_of_new_domain(is_replaced))
    before = state or WriterState(keyring.repository.hex(), "", recipients_digest)
    after = msgspec.structs.replace(
        before, domain=domain.secret.hex(), generation=number, earlier=tuple(earlier)
    )
    if after != before:
        save_state(after)
    return after


def _warning_of_new_domain(is_replaced: bool) -> str:
    if is_replaced:
        return (
            "a removal of recipients replaced the repository's secret, and no identity was given that "
            "decrypts the new one: backups of this machine do not deduplicate with those of others and are "
            "reported as unproven; to change that, run `casfs key accept --identity FILE` once on it"
        )
    return (
        "this machine has not written to this repository before and was given no identity: its "
        "backups deduplicate with nothing in it and are reported as unproven; to change that, run "
        "`casfs key accept --identity FILE` once on this machine"
    )


def _repository_domain(keyring: Keyring) -> DedupDomain | None:
    """Return the repository's own domain, or None if no session with it can be decrypted."""
    try:
        return keyring.own_domain()
    except KeyMissingError as error:
        log.info("the repository's own domain is unknown: %s", error)
        return None
