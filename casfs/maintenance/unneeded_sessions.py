"""Remove the sessions of an encrypted repository that nothing is encrypted with any more."""

from __future__ import annotations

import logging

from casfs.errors import CasfsError
from casfs.format.delta import FOLDER as DELTAS
from casfs.format.delta import SESSION_HEADER as DELTA_HEADER
from casfs.format.delta import session_of
from casfs.format.key_derivation import SessionId
from casfs.format.pack import SESSION_HEADER, parse_session
from casfs.repository.remote_writers import is_shared
from casfs.repository.repository import Repository
from casfs.storage.locks import LockMode
from casfs.store.blob_store import pack_name

log = logging.getLogger(__name__)


def remove_unneeded_sessions(repository: Repository) -> int:
    """Remove the sessions that no pack, delta and snapshot names; return the number removed.

    Nothing is removed where a pack or snapshot cannot be read, while another process writes, or where hosts
    write over a network.
    """
    encryption = repository.config.encryption
    if encryption is None:
        return 0
    from casfs.crypto.session_files import remove_session, session_ids

    storage = repository.store.storage
    listed = session_ids(storage)
    if any(lock.mode != LockMode.READER for lock in repository.other_locks().values()):
        return 0
    if is_shared(storage):
        return 0
    needed = {bytes.fromhex(encryption.session)}
    if repository.key_manager is not None:
        generations = repository.key_manager.keyring.generations
        needed |= {bytes.fromhex(one.session) for one in generations.records}
    try:
        for pack, _ in repository.store.stored_packs():
            head = storage.read(pack_name(pack), 0, SESSION_HEADER)
            needed.add(parse_session(pack.id, head)[0])
        for snapshot_id in repository.snapshots.ids():
            envelope = repository.snapshots.envelope(snapshot_id)
            if envelope is not None:
                needed.add(envelope.session)
        for item in storage.list(DELTAS):
            session_id = session_of(storage.read(item.name, 0, DELTA_HEADER))
            if session_id is not None:
                needed.add(SessionId(session_id))
    except CasfsError as error:
        log.info("no session is removed: %s", error)
        return 0
    unneeded = [session_id for session_id in listed if session_id not in needed]
    for session_id in unneeded:
        remove_session(storage, session_id)
    return len(unneeded)
