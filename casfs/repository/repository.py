"""A repository: configuration, blobs and snapshots of one folder, opened for reading or for writing.

Reading takes no lock and never blocks a backup. Writing holds a lock for as long as the repository is
open. An open repository belongs to the process that opened it and is never used across a fork.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from casfs.crypto.opening import create_encryption, make_ciphers, make_codec, open_key_manager
from casfs.crypto.trust_state import pin
from casfs.digest import SnapshotId, short_id
from casfs.errors import (
    AmbiguousIdError,
    CasfsError,
    ExistsError,
    IndexUnusableError,
    IntegrityError,
    KeyMissingError,
    NotFoundError,
    StorageError,
)
from casfs.format.chunker import Chunker
from casfs.format.config import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    RepositoryConfig,
    decode_config,
    encode_config,
    new_config,
)
from casfs.format.snapshot import (
    MAX_SNAPSHOT_BYTES,
    Envelope,
    Snapshot,
    decode_snapshot,
    encode_snapshot,
    read_envelope,
)
from casfs.format.tree import Node
from casfs.index.fingerprint import clear
from casfs.index.index import Index
from casfs.index.schema import PackRecord
from casfs.paths import parse_snapshot_path
from casfs.repository.index_opening import close_index, open_index, open_index_readonly
from casfs.repository.snapshot_filter import ALL_SNAPSHOTS, SnapshotFilter
from casfs.storage.local import LocalStorage, allocate_reserve, release_reserve
from casfs.storage.locks import (
    LockMode,
    LockRecord,
    RepositoryLock,
    list_and_reap_locks,
    remove_stale_temporaries,
)
from casfs.store.blob_store import BlobStore
from casfs.store.writer import BlobWriter
from casfs.trees.content import ContentReader
from casfs.trees.reader import TreeReader
from casfs.user_dirs import index_dir

if TYPE_CHECKING:
    # What an unencrypted repository does without is not loaded for it.
    from casfs.crypto.key_manager import KeyManager
    from casfs.crypto.opening import Unlock
    from casfs.crypto.recipients import Recipient

log = logging.getLogger(__name__)

DEFAULT_LEVEL = 3
"""zstd's own default: some 250 MB/s a core, close to what the stronger levels reach on real trees."""

_FOLDERS = ("packs", "snapshots", "condemned", "locks", "tmp")
_README = (
    "This folder is a casfs repository: backups of files, kept as digest-named packs.\n"
    "Change nothing in it by hand. `index` can be rebuilt; everything else is needed.\n"
)


class Repository:
    """An open repository; `close` it, or use it in a `with` block."""

    def __init__(
        self,
        root: Path,
        config: RepositoryConfig,
        storage: LocalStorage,
        index: Index,
        level: int,
        lock: RepositoryLock | None,
        vault: KeyManager | None = None,
    ) -> None:
        self.root = root
        self.config = config
        self.vault = vault
        self.codec = make_codec(level, vault)
        self.store = BlobStore(storage, index, self.codec, make_ciphers(storage, vault))
        self.trees = TreeReader(self.store.read)
        self._lock = lock
        self._losses = 0

    @classmethod
    def create(
        cls, root: Path, recipients: Sequence[Recipient] = (), passphrase: str | None = None
    ) -> RepositoryConfig:
        """Make a repository in an empty or new folder and return its configuration.

        With recipients or a passphrase it is encrypted. Raises ExistsError where something is already,
        StorageError where the disk refuses.
        """
        if (root / CONFIG_NAME).exists():
            raise ExistsError(f"there is a repository in {root} already; nothing was changed")
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            if any(root.iterdir()):
                raise ExistsError(f"{root} is not empty; name a new or empty folder")
            for folder in _FOLDERS:
                (root / folder).mkdir(mode=0o700)
            (root / "README").write_text(_README)
        except NotADirectoryError as error:
            raise ExistsError(
                f"{root} is not a folder, and no repository can be made there"
            ) from error
        except FileExistsError as error:
            raise ExistsError(
                f"{root} is not a folder, and no repository can be made there"
            ) from error
        except OSError as error:
            raise StorageError("make a repository in", str(root), error) from error
        config = new_config(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        storage = LocalStorage(root)
        if recipients or passphrase is not None:
            config = create_encryption(storage, config, recipients, passphrase)
        index = Index(index_dir(root, config.id, encrypted=config.encryption is not None))
        index.rebuild(tuple)
        close_index(index)
        allocate_reserve(root)
        storage.write(CONFIG_NAME, encode_config(config))
        pin(root.absolute(), config)
        return config

    @classmethod
    def open(
        cls,
        root: Path,
        verb: str | None = None,
        mode: LockMode = LockMode.SHARED,
        level: int = DEFAULT_LEVEL,
        sync: bool = True,
        on_step: Callable[[str], None] | None = None,
        reader: str | None = None,
        takes_notes: bool = False,
        frees: bool = False,
        unlock: Unlock | None = None,
        closed_ok: bool = False,
    ) -> Repository:
        """Open a repository: for writing when `verb` says what for, for reading otherwise.

        A reader that says in `reader` what it is keeps a prune from removing what it may still read,
        where it may write into the repository's `locks`; it keeps nobody from anything else. One that
        `takes_notes` can mark in the index what it found, where it may write there. `unlock` is asked for
        identities where the repository is encrypted; it must have some unless the caller can do without
        reading (`closed_ok`).

        Raises NotFoundError, FormatError, IntegrityError (configuration), LockedError, StorageError
        and IndexUnusableError. A process has a repository open only once at a time. Who opens it to free
        space (`frees`) can do so on a full disk.
        """
        root = root.absolute()
        config = read_config(root)
        if verb is None:
            storage = LocalStorage(root)
            vault = open_key_manager(root, storage, config, unlock, None, closed_ok)
            note = _reader_lock(root, reader, config) if reader is not None else None
            try:
                ciphers = make_ciphers(storage, vault)
                codec = make_codec(level, vault)
                index = open_index_readonly(root, config.id, storage, codec, takes_notes, ciphers)
            except BaseException:
                if note is not None:
                    note.release()
                raise
            return cls(root, config, storage, index, level, note, vault)
        if frees:
            release_reserve(root)
        lock = RepositoryLock.acquire(root / "locks", verb, mode, _shown_host(config))
        try:
            remove_stale_temporaries(root)
            storage = LocalStorage(root, writer=lock.name, sync=sync, on_step=on_step)
            vault = open_key_manager(root, storage, config, unlock, mode, closed_ok)
            path = index_dir(root, config.id, encrypted=vault is not None)
            if mode == LockMode.EXCLUSIVE:
                clear(path)
            index = open_index(
                root,
                path,
                storage,
                make_codec(level, vault),
                lock.name,
                on_step,
                sync,
                ciphers=make_ciphers(storage, vault),
            )
            repository = cls(root, config, storage, index, level, lock, vault)
            repository._losses = index.loss_epoch()
        except OSError as error:
            lock.release()
            raise StorageError("open", str(root), error) from error
        except BaseException:
            lock.release()
            raise
        return repository

    def close(self) -> None:
        """Close the index, remember which packs were read as a whole, and give the lock back."""
        storage = self.store.storage
        verified = self._verified_packs()
        close_index(self.store.index)
        self._remember_verified(verified)
        if isinstance(storage, LocalStorage):
            storage.close()
        if self._lock is not None:
            self._lock.release()
            if self._lock.mode != LockMode.READER:
                allocate_reserve(self.root)

    def _verified_packs(self) -> list[PackRecord]:
        """Return the packs all of whose blobs and whose directory were verified."""
        if self.store.coverage.is_empty():
            return []
        try:
            found = self.store.coverage.complete_packs(self.store.index.packs())
            for record in found:
                self.store.read_directory(record.pack, record.pack_bytes)
        except CasfsError:
            return []
        return found

    def _remember_verified(self, packs: list[PackRecord]) -> None:
        if not packs:
            return
        try:
            index = Index(self.store.index.path)
            try:
                # It may be another index by now, with other ordinals. And a pack with bytes that its
                # name does not stand for may have sound blobs: it stays one that a prune replaces.
                there = {one.ordinal: one.pack for one in index.packs() if not one.is_damaged}
                same = [one.ordinal for one in packs if there.get(one.ordinal) == one.pack]
                index.mark_verified(same, int(time.time()))
            finally:
                close_index(index)
        except IndexUnusableError as error:
            log.info("that packs were verified cannot be remembered: %s", error)

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def is_locked(self) -> bool:
        """Tell whether the repository is encrypted and nothing was given that opens it."""
        return self.vault is not None and not self.vault.can_read

    @property
    def loss_epoch(self) -> int:
        """How often the index had lost entries when the repository was opened for writing."""
        return self._losses

    def chunker(self) -> Chunker:
        """Return a chunker with the repository's parameters, for one thread."""
        config = self.config.chunker
        if self.vault is not None and self.vault.domain is not None:
            config = msgspec.structs.replace(config, seed=self.vault.domain.chunker_seed)
        return Chunker(config)

    @property
    def tree_seed(self) -> int:
        """The start value of the CRC-32 that splits big directories."""
        if self.vault is not None and self.vault.domain is not None:
            return self.vault.domain.tree_seed
        return self.config.tree_seed

    def writer(self, dry_run: bool = False, spool_in_memory: bool = False) -> BlobWriter:
        """Return a writer of blobs; the repository is open for writing."""
        return BlobWriter(
            self.store,
            dry_run=dry_run,
            spool_in_memory=spool_in_memory,
            session=self.vault.session if self.vault is not None else None,
        )

    def content(self, node: Node) -> ContentReader:
        """Return the reader of a regular file's content list."""
        return ContentReader(node.content, node.levels, self.store.read)

    def publish(self, snapshot: Snapshot, complete: bool = True) -> SnapshotId:
        """Store a snapshot as the last step of a backup.

        `with_gpg_identities` says that all its blobs are known to be durable and in the index.
        """
        session = self.vault.session() if self.vault is not None else None
        snapshot_id, data = encode_snapshot(snapshot, self.codec, session)
        if complete:
            self.store.index.mark_complete(snapshot_id, self._losses)
        self.store.storage.create(f"snapshots/{snapshot_id.hex()}", data)
        if self.vault is not None:
            self.vault.record_published(snapshot_id, snapshot.time_ns)
        return snapshot_id

    def replace_snapshot(
        self,
        snapshot_id: SnapshotId,
        snapshot: Snapshot,
        root: Node | None = None,
        tags: tuple[str, ...] | None = None,
    ) -> SnapshotId:
        """Publish a snapshot with another root or other tags, then remove the one that it replaces.

        A crash between the two leaves both, of which only the new one is listed.
        """
        changed = msgspec.structs.replace(
            snapshot,
            root=root if root is not None else snapshot.root,
            tags=tags if tags is not None else snapshot.tags,
            replaces=snapshot_id,
        )
        complete = root is None and self.store.index.is_complete(snapshot_id)
        new_id = self.publish(changed, complete)
        if snapshot.replaces is not None:
            # A crash may have left it; with the one that replaces it gone, it would be listed again.
            self.delete_snapshot(SnapshotId(snapshot.replaces))
        self.delete_snapshot(snapshot_id)
        return new_id

    def delete_snapshot(self, snapshot_id: SnapshotId) -> None:
        """Remove a snapshot; its blobs stay until a prune."""
        if self.vault is not None:
            self.vault.record_deleted(snapshot_id)
        self.store.storage.delete(f"snapshots/{snapshot_id.hex()}")

    def other_locks(self) -> dict[str, LockRecord]:
        """Return the locks that other living processes hold, by name."""
        own = self._lock.name if self._lock is not None else None
        try:
            live = list_and_reap_locks(self.root / "locks")
        except OSError as error:
            raise StorageError("read the locks in", str(self.root / "locks"), error) from error
        return {name: record for name, record in live.items() if name != own}

    def snapshot_ids(self) -> list[SnapshotId]:
        """Return the ids of all snapshot files, sorted."""
        ids = []
        for name, _, _ in self.store.storage.list("snapshots"):
            text = name.rpartition("/")[2]
            if len(text) == 64 and all(c in "0123456789abcdef" for c in text):
                ids.append(SnapshotId(bytes.fromhex(text)))
        return ids

    def load(self, snapshot_id: SnapshotId) -> Snapshot:
        """Return a verified snapshot; raises NotFoundError or TreeError.

        In an encrypted repository also KeyMissingError and SessionError.
        """
        data = self.store.storage.read(f"snapshots/{snapshot_id.hex()}", 0, MAX_SNAPSHOT_BYTES)
        keyring = self.vault.keyring if self.vault is not None else None
        return decode_snapshot(snapshot_id, data, self.codec, keyring)

    def envelope(self, snapshot_id: SnapshotId) -> Envelope | None:
        """Return what an encrypted snapshot tells without a key; raises NotFoundError or TreeError."""
        data = self.store.storage.read(f"snapshots/{snapshot_id.hex()}", 0, MAX_SNAPSHOT_BYTES)
        return read_envelope(snapshot_id, data)

    def is_from_trusted_writer(self, snapshot_id: SnapshotId) -> bool:
        """Tell whether whoever published a snapshot knew the repository's own secret, if it has one.

        Raises as `load` does.
        """
        if self.vault is None:
            return True
        envelope = self.envelope(snapshot_id)
        if envelope is None:
            return False
        return self.vault.keyring.is_from_trusted_writer(
            self.vault.keyring.session(envelope.session)
        )

    def snapshots(self) -> Iterator[tuple[SnapshotId, Snapshot]]:
        """Yield every snapshot from the oldest to the newest; those that are damaged, or cannot
        be read, are logged and left out.

        One that another replaces is left out too: a crash between the two steps of a change of tags
        leaves both. Raises KeyMissingError where there are only such as the identities do not open.
        """
        found: list[tuple[SnapshotId, Snapshot]] = []
        closed: dict[SnapshotId, KeyMissingError] = {}
        for snapshot_id in self.snapshot_ids():
            try:
                found.append((snapshot_id, self.load(snapshot_id)))
            except NotFoundError:
                continue
            except KeyMissingError as error:
                closed[snapshot_id] = error
            except (IntegrityError, StorageError) as error:
                log.warning("%s; run casfs check", error)
        for snapshot_id, missing in closed.items():
            if not found:
                raise missing  # there are snapshots, and all of them are for others
            log.warning("snapshot %s is left out: %s", short_id(snapshot_id), missing)
        replaced = {snapshot.replaces for _, snapshot in found}
        found.sort(key=lambda item: (item[1].time_ns, item[0]))
        for snapshot_id, snapshot in found:
            if snapshot_id not in replaced:
                yield snapshot_id, snapshot

    def resolve(
        self, name: str, latest_of: SnapshotFilter = ALL_SNAPSHOTS
    ) -> tuple[SnapshotId, Snapshot]:
        """Return the snapshot that `latest`, an id or a unique prefix of an id names.

        `latest` is the newest that `latest_of` accepts. Raises NotFoundError and AmbiguousIdError.
        """
        if name == "latest":
            everything = list(self.snapshots())
            if not everything:
                raise NotFoundError(f"the repository {self.root} has no snapshots yet")
            matching = [item for item in everything if latest_of.accepts(item[1])]
            if not matching:
                raise NotFoundError(
                    f"no snapshot matches; {self.root} has {len(everything)}: see casfs snapshots"
                )
            found = matching[-1]
        else:
            snapshot_id = self.resolve_id(name)
            found = snapshot_id, self.load(snapshot_id)
        if not self.is_from_trusted_writer(found[0]):
            log.warning(
                "snapshot %s is unproven: who published it did not have this repository's own secret, so "
                "it may come from whoever holds the storage",
                short_id(found[0]),
            )
        return found

    def resolve_id(self, prefix: str) -> SnapshotId:
        """Return the one id that begins so; raises AmbiguousIdError and NotFoundError."""
        wanted = prefix.lower()
        matches = [i for i in self.snapshot_ids() if wanted and i.hex().startswith(wanted)]
        if len(matches) > 1:
            raise AmbiguousIdError(prefix, [match.hex() for match in matches])
        if not matches:
            raise NotFoundError(
                f"no snapshot has the id {prefix!r}; casfs snapshots lists those that there are"
            )
        return matches[0]

    def resolve_path(self, spec: str) -> tuple[SnapshotId, Snapshot, bytes, Node]:
        """Return the snapshot, the path and the node that `SNAP` or `SNAP:PATH` names."""
        name, _, text = spec.partition(":")
        snapshot_id, snapshot = self.resolve(name)
        path = parse_snapshot_path(text)
        node = self.trees.resolve(snapshot.root, path)
        if node is None:
            raise NotFoundError(f"snapshot {snapshot_id.hex()[:12]} has no {text!r}")
        return snapshot_id, snapshot, path, node


def _shown_host(config: RepositoryConfig) -> str | None:
    """Return what a lock tells of the machine: nothing where the storage is not to know."""
    return None if config.encryption is None else "a machine"


def _reader_lock(root: Path, reader: str, config: RepositoryConfig) -> RepositoryLock | None:
    try:
        return RepositoryLock.acquire(root / "locks", reader, LockMode.READER, _shown_host(config))
    except StorageError:
        return None  # a medium, or a user, that may only read


def read_config(root: Path) -> RepositoryConfig:
    """Return the configuration of the repository in a folder.

    Raises NotFoundError, FormatError, IntegrityError and StorageError.
    """
    path = root / CONFIG_NAME
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"there is no repository in {root}; casfs init makes one") from error
    except OSError as error:
        raise StorageError("read", str(path), error) from error
    return decode_config(data, str(root))
