"""Encrypted repositories for tests: keys that are always the same, and what opens them."""

from __future__ import annotations

import base64
import os
from pathlib import Path

from casfs.backup.run import BackupOptions, BackupResult, run_backup
from casfs.crypto import age
from casfs.crypto.identities import Identities
from casfs.crypto.recipients import Recipient, RecipientKind
from casfs.crypto.trust_root import TrustRoot
from casfs.digest import SnapshotId
from casfs.format.config import RepositoryConfig, encode_config
from casfs.format.generation import new_generation
from casfs.format.key_derivation import DedupDomain, WriteSession
from casfs.format.signature import SigningKey
from casfs.monitor import RecordingMonitor
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_reading, open_for_writing
from casfs.repository.repository import Repository
from casfs.storage.base import Storage

# Made for these tests; they protect nothing.
PUBLIC = "age1m6w9vz8wnelhhceh4v03pcehg7hqr7kxram4qmk6n4z2fg8hwerqmasyhq"
SECRET = "AGE-SECRET-KEY-102NTSUC5HJ7FVDXJQPQUK5DF95DFW30C6KFPLZ7PKWSZQXMCYCVSNWJDXU"
OTHER_PUBLIC = "age1r3pzt2np6544e7z6nkrw7ufsvjeprfeescny6ykxzv95d7udmsjqeln3q9"
OTHER_SECRET = "AGE-SECRET-KEY-1D88DZGXV96QDNLQ3RFEMW6CSL6MSK7X4F7Y0J8T9WAR8R0CFTP9S4SUG47"

REPOSITORY = bytes(range(32))
DOMAIN = DedupDomain(REPOSITORY, bytes(range(32, 64)))
SESSION = WriteSession(REPOSITORY, bytes(range(64, 96)), (DOMAIN,))

GPG_KEY = base64.b64decode(
    "mDMEawpZrBYJKwYBBAHaRw8BAQdAznlylUn2+yr9nRWrm9TmhZwOTEytkLSvm+5UCIbVLvi0FUFubiA8YW5uQGV4YW1wbGUu"
    "b3JnPoiQBBMWCAA4FiEEoZWskCQmmy6y4/7TM+za9VZuwIMFAmsKWawCGwMFCwkIBwIGFQoJCAsCBBYCAwECHgECF4AACgkQ"
    "M+za9VZuwIPnpwD8DJmlDav3D4eKN0VXlHzUwFX/Zzq/DCMzVjMehXQ8sa8A/jEsBY0EJyT/XxHXv4I/H8sc5AB2OGZBQoiA"
    "/Gv9g/gCuDgEawpZrBIKKwYBBAGXVQEFAQEHQISUWAUI/vy6MoUmlfqvzfEhQQTJqjCkV4oo49aYKL8rAwEIB4h4BBgWCAAg"
    "FiEEoZWskCQmmy6y4/7TM+za9VZuwIMFAmsKWawCGwwACgkQM+za9VZuwIPLgAD/SIkZW2eTNgtTKDYo63AtgFp1eu7FZW1d"
    "NsKKf/aOrm8A/2L/7UkpPrLQloMIgEEFGROqxNI3nUJ6y7g7pf03Cp0G"
)
GPG_FINGERPRINT = "A195AC9024269B2EB2E3FED333ECDAF5566EC083"
OTHER_GPG_KEY = base64.b64decode(
    "mDMEawpZrBYJKwYBBAHaRw8BAQdAtrFYZ+TEVYKjWgDEkPnqQ+eKNo+FauUBIGpB5RBCdw60FUV2ZSA8ZXZlQGV4YW1wbGUu"
    "b3JnPoiQBBMWCAA4FiEEUyWGMcQw+F2MxxyOgviAZG7wyXgFAmsKWawCGwMFCwkIBwIGFQoJCAsCBBYCAwECHgECF4AACgkQ"
    "gviAZG7wyXg2BwD/RDsT14weJD/Ny5RoxEuQ4ced2KY+rC9xc3J83VSVv3oA/3l0EBX5C1IhKJNZ2XWLuybkEDiq5jvrnesB"
    "+chH2MkLuDgEawpZrBIKKwYBBAGXVQEFAQEHQClMO2DKXWmji4Ab5SZGNnl+DstN897MlCJB1QRd+gFqAwEIB4h4BBgWCAAg"
    "FiEEUyWGMcQw+F2MxxyOgviAZG7wyXgFAmsKWawCGwwACgkQgviAZG7wyXjQjwEAuFdgK+y25WaMalVdnCkV2oYwLnFnIaXb"
    "hHRXLwNeBxYBAOcUaYB0CXAEt+8eTBKYKYKn+op8ul8WyILOMHZE2bMD"
)
"""Two exported OpenPGP keys; each has one subkey for encryption, which begins at `GPG_SUBKEY_OFFSET`."""
GPG_SUBKEY_OFFSET = 222

SECOND_DOMAIN = DedupDomain(REPOSITORY, bytes(range(128, 160)))
SECOND_SESSION = WriteSession(REPOSITORY, bytes(range(160, 192)), (SECOND_DOMAIN, DOMAIN))
SIGNING_KEY = SigningKey(bytes(range(192, 224)))
GENERATION = new_generation(1, DOMAIN, SECOND_SESSION, bytes(range(32)).hex(), SIGNING_KEY)
"""The record of a domain that replaced `DOMAIN`."""

RECIPIENT = Recipient(RecipientKind.AGE, PUBLIC)
OTHER = Recipient(RecipientKind.AGE, OTHER_PUBLIC)


def trust_of(config: RepositoryConfig) -> TrustRoot:
    """Return the trust root of a repository with this configuration."""
    return TrustRoot(encode_config(config), "the test")


class OneSession:
    """What knows one session, and opens no other."""

    def __init__(self, session: WriteSession = SESSION) -> None:
        self._session = session

    def session(self, session_id: bytes) -> WriteSession:
        assert session_id == self._session.id
        return self._session


def identities(*secrets: str) -> Identities:
    """Return age identities, that of `RECIPIENT` by default."""
    return Identities([age.identity_from_line(one) for one in secrets or (SECRET,)])


def unlock(storage: Storage, trust: TrustRoot) -> Identities:
    """Open what is for `RECIPIENT`."""
    return identities()


def unlock_other(storage: Storage, trust: TrustRoot) -> Identities:
    """Open what is for `OTHER`."""
    return identities(OTHER_SECRET)


class EncryptedRepositoryFixture:
    """An encrypted repository, and backups into it by a machine that cannot read it."""

    def __init__(self, folder: Path, *recipients: Recipient) -> None:
        self.root = folder / "repository"
        self.config = create_repository(self.root, recipients or (RECIPIENT,))

    def writing(self, verb: str = "test") -> Repository:
        return open_for_writing(self.root, verb, OpenOptions(allow_no_identity=True, sync=False))

    def reading(self) -> Repository:
        return open_for_reading(self.root, OpenOptions(unlock=unlock))

    def back_up(self, *sources: Path, **options: object) -> BackupResult:
        """Publish a snapshot of the sources without being able to read any."""
        paths = tuple(os.fsencode(source) for source in sources)
        chosen = BackupOptions(**({"paths": paths, "host": "here"} | options))  # type: ignore[arg-type]
        with self.writing() as repository:
            return run_backup(repository, chosen, RecordingMonitor())

    def id_of(self, result: BackupResult) -> SnapshotId:
        assert result.snapshot_id is not None
        return result.snapshot_id
