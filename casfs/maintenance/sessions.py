"""Sessions that nothing was stored in any more: a prune removes their wrapped keys.

A session of a backup that still runs has no pack yet, so nothing is removed while anybody else writes.
"""

from __future__ import annotations

import logging

from casfs.errors import CasfsError
from casfs.format.pack import SESSION_HEADER, parse_session
from casfs.repository.repository import Repository
from casfs.storage.locks import LockMode
from casfs.store.blob_store import pack_name

log = logging.getLogger(__name__)


def remove_unneeded_sessions(repository: Repository) -> int:
    """Remove the sessions that no pack and no snapshot names; returns how many those were.

    Where anything cannot be read, or another process writes, none is removed.
    """
    encryption = repository.config.encryption
    if encryption is None:
        return 0
    from casfs.crypto.session_files import remove_session, session_ids

    storage = repository.store.storage
    listed = session_ids(storage)
    if any(lock.mode != LockMode.READER for lock in repository.other_locks().values()):
        return 0
    needed = {bytes.fromhex(encryption.session)}
    try:
        for pack, _ in repository.store.stored_packs():
            head = storage.read(pack_name(pack), 0, SESSION_HEADER)
            needed.add(parse_session(pack, head)[0])
        for snapshot_id in repository.snapshot_ids():
            envelope = repository.envelope(snapshot_id)
            if envelope is not None:
                needed.add(envelope.session)
    except CasfsError as error:
        log.info("no session is removed: %s", error)
        return 0
    gone = [session_id for session_id in listed if session_id not in needed]
    for session_id in gone:
        remove_session(storage, session_id)
    return len(gone)
