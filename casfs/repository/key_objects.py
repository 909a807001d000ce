"""Fetch the objects that unlock an encrypted remote repository, in a child process.

A process that has used a remote storage must not fork: its libraries have threads that a child lacks. A
background mount forks, but asks for a passphrase before that. So a child process reads the few small objects
that unlocking needs, and this process uses the copies.
"""

from __future__ import annotations

import os
from typing import NoReturn

import msgspec

from casfs.errors import CasfsError, IntegrityError, NotFoundError
from casfs.format.config import CONFIG_NAME
from casfs.repository.place import RemotePlace
from casfs.storage.base import Storage
from casfs.storage.memory import MemoryStorage

_MAX_OBJECT_BYTES = 1024 * 1024
_MOST_OBJECTS = 1000
_MAX_BYTES = 64 * 1024 * 1024


class _Fetched(msgspec.Struct):
    objects: dict[str, bytes]
    error: str = ""
    exit_code: int = 1


def fetch_key_objects(place: RemotePlace) -> MemoryStorage:
    """Return a storage that holds the configuration, the recipients and the wrapped identities.

    Raises CasfsError with the message of the child's error. A missing object is left out.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run_child(place, writing)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            data = pipe.read(_MAX_BYTES)
    finally:
        os.waitpid(child, 0)
    try:
        fetched = msgspec.msgpack.decode(data, type=_Fetched)
    except msgspec.DecodeError as error:
        raise CasfsError(f"the keys of the repository in {place} could not be fetched") from error
    if fetched.error:
        kind = IntegrityError if fetched.exit_code == IntegrityError.exit_code else CasfsError
        raise kind(fetched.error)
    storage = MemoryStorage(str(place))
    for name, content in fetched.objects.items():
        storage.write(name, content)
    return storage


def _run_child(place: RemotePlace, writing: int) -> NoReturn:
    code = 1
    try:
        storage = place.open_storage()
        try:
            fetched = _Fetched(read_key_objects(storage))
        except CasfsError as error:
            fetched = _Fetched({}, str(error), error.exit_code)
        finally:
            storage.close()
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(msgspec.msgpack.encode(fetched))
        code = 0
    finally:
        os._exit(code)


def read_key_objects(storage: Storage) -> dict[str, bytes]:
    """Return the objects that unlocking needs, by name."""
    found = {}
    from casfs.crypto.identities import IDENTITIES
    from casfs.crypto.recipients import RECIPIENTS_NAME

    names = [CONFIG_NAME, RECIPIENTS_NAME]
    for entry in storage.list(IDENTITIES):
        names.append(entry.name)
        if len(names) > _MOST_OBJECTS:
            raise IntegrityError(f"{storage.url} has more than {_MOST_OBJECTS} wrapped identities")
    for name in names:
        try:
            found[name] = storage.read(name, 0, _MAX_OBJECT_BYTES)
        except NotFoundError:
            continue
    return found
