"""What a machine remembers of the repositories that it writes to, and what it refuses because of that."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from casfs.crypto.identities import Identities
from casfs.crypto.key_manager import (
    KeyManager,
    require_recipients,
    require_trusted_recipients,
    trust_current_recipients,
)
from casfs.crypto.recipients import Recipient, RecipientKind, RecipientList, write_recipients
from casfs.crypto.trust_state import (
    WriterState,
    load_state,
    pin,
    pin_generations,
    pin_lock_policy,
    pinned_generations,
    pinned_lock_policy,
    save_state,
    state_folder,
    verify_pin,
)
from casfs.crypto.writers import SignedSnapshot, TrustedWriters
from casfs.digest import SnapshotId
from casfs.errors import RefusedError, StorageError, TrustError
from casfs.format.config import CIPHER, ChunkerConfig, EncryptionConfig, RepositoryConfig
from casfs.format.key_derivation import DedupDomain
from casfs.format.lock_policy import new_policy
from casfs.format.signature import Author, Signers
from casfs.format.versions import NEWEST_FORMAT, OLDEST_FORMAT
from casfs.repository.creation import create_repository
from casfs.repository.opening import OpenOptions, open_for_writing
from casfs.repository.place import read_config
from casfs.storage.local import LocalStorage
from tests.support.encryption import (
    GPG_FINGERPRINT,
    GPG_KEY,
    OTHER,
    OTHER_PUBLIC,
    PUBLIC,
    RECIPIENT,
    EncryptedRepositoryFixture,
    identities,
    trust_of,
    unlock,
)
from tests.support.other_user import OTHER_USER, needs_root

PLAIN = RepositoryConfig("a" * 64, "today")
CONFIG = RepositoryConfig(
    "a" * 64, "today", encryption=EncryptionConfig(CIPHER, "b" * 64, "c" * 64)
)
STATE = WriterState("a" * 64, "d" * 64, "e" * 64)


@pytest.fixture(autouse=True)
def state(own_home: Path) -> Path:
    return own_home / "state" / "casfs"


@pytest.fixture
def repo(tmp_path: Path) -> EncryptedRepositoryFixture:
    return EncryptedRepositoryFixture(tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "file").write_bytes(b"content")
    return folder


def stored(root: Path) -> set[Path]:
    """Return all files but the locks and what belongs to no backup."""
    return {
        path
        for path in root.rglob("*")
        if path.is_file() and path.parent.name != "locks" and path.name != "reserve"
    }


class TestStateFile:
    def test_the_trust_state_is_loaded_as_it_was_saved(self) -> None:
        assert load_state(CONFIG) is None
        save_state(STATE)
        assert load_state(CONFIG) == STATE
        save_state(msgspec.structs.replace(STATE, last_snapshot="f" * 64, last_time_ns=5))
        loaded = load_state(CONFIG)
        assert loaded is not None and loaded.last_snapshot == "f" * 64
        assert loaded.own_domain() == DedupDomain(b"\xaa" * 32, b"\xdd" * 32)

    def test_a_repository_whose_id_begins_like_another_changes_nothing_that_is_known_of_that(
        self, state: Path
    ) -> None:
        """The names of the files have half of the id, which the owner of a repository can choose."""
        alike = msgspec.structs.replace(CONFIG, id="a" * 63 + "b", format=2)
        author = Author(b"\x01" * 32, bytes(64))
        signed = SignedSnapshot(SnapshotId(bytes(32)), "web", Signers(author, author.key))
        save_state(STATE)
        pin_generations(CONFIG.id, [])
        pin_lock_policy(new_policy(CONFIG.id, 86_400, 1, None))
        known = TrustedWriters(CONFIG)
        known.learn([signed])
        before = {path.name: path.read_bytes() for path in state.iterdir()}
        assert len(before) == 4
        with pytest.raises(TrustError, match="is damaged"):
            load_state(alike)
        for use in (pinned_generations, pinned_lock_policy):
            with pytest.raises(TrustError, match="the id of this one begins alike"):
                use(alike.id)
        (state / f"{CONFIG.id[:32]}.json").unlink()
        with pytest.raises(TrustError, match="the id of this one begins alike"):
            TrustedWriters(alike).learn([])
        for path in state.iterdir():
            assert path.read_bytes() == before[path.name]

    def test_the_trust_state_is_readable_by_its_owner_only_whatever_the_umask(
        self, state: Path
    ) -> None:
        before = os.umask(0)
        try:
            save_state(STATE)
            pin(Path("/repository"), trust_of(CONFIG))
        finally:
            os.umask(before)
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        files = list(state.iterdir())
        assert len(files) == 2
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}

    def test_a_state_folder_is_private_with_those_above_it_whatever_the_umask(
        self, own_home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(own_home / "a" / "b"))
        before = os.umask(0)
        try:
            save_state(STATE)
        finally:
            os.umask(before)
        for folder in (own_home / "a", own_home / "a" / "b", own_home / "a" / "b" / "casfs"):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    @pytest.mark.parametrize("whose", ["the folder", "the folder above it"])
    def test_a_state_folder_that_others_can_write_is_refused(self, state: Path, whose: str) -> None:
        save_state(STATE)
        changeable = state if whose == "the folder" else state.parent
        changeable.chmod(0o777)
        uses: list[Callable[[], object]] = [
            lambda: save_state(STATE),
            lambda: load_state(CONFIG),
            lambda: verify_pin("/repository", trust_of(CONFIG)),
            lambda: pin("/repository", trust_of(CONFIG)),
        ]
        for use in uses:
            with pytest.raises(RefusedError, match=f"change the folder {changeable},"):
                use()

    @needs_root
    def test_a_state_folder_of_another_user_is_refused(self, state: Path) -> None:
        """As root gets one of `sudo -E`, which keeps the user's HOME."""
        save_state(STATE)
        os.chown(state, OTHER_USER, OTHER_USER)
        with pytest.raises(RefusedError, match="sudo -H"):
            load_state(CONFIG)

    @needs_root
    @pytest.mark.parametrize("levels", [0, 1], ids=["the folder above", "two levels above"])
    def test_a_state_folder_below_a_folder_of_another_user_is_refused(
        self, state: Path, levels: int
    ) -> None:
        """Its owner could take the records away, so that a replaced repository were a first use."""
        save_state(STATE)
        above = state.parents[levels]
        st = above.stat()
        os.chown(above, OTHER_USER, OTHER_USER)
        try:
            with pytest.raises(RefusedError, match=f"change the folder {above},"):
                verify_pin("/repository", trust_of(CONFIG))
        finally:
            os.chown(above, st.st_uid, st.st_gid)

    @needs_root
    def test_a_state_folder_that_is_a_symlink_of_another_user_is_refused(
        self, state: Path, tmp_path: Path
    ) -> None:
        save_state(STATE)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        state.rename(tmp_path / "taken")
        state.symlink_to(elsewhere)
        os.chown(state, OTHER_USER, OTHER_USER, follow_symlinks=False)
        with pytest.raises(RefusedError, match=f"change the folder {state},"):
            save_state(STATE)
        assert os.listdir(elsewhere) == []

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\xff",
            b"{}",
            b"[]",
            msgspec.json.encode(msgspec.structs.replace(STATE, repository="b" * 64)),
            msgspec.json.encode(msgspec.structs.replace(STATE, domain="dd")),
            msgspec.json.encode(msgspec.structs.replace(STATE, domain="x" * 64)),
        ],
    )
    def test_a_damaged_trust_state_is_refused(self, state: Path, data: bytes) -> None:
        save_state(STATE)
        (file,) = state.iterdir()
        file.write_bytes(data)
        with pytest.raises(TrustError, match="is damaged; restore it, or remove it"):
            load_state(CONFIG)

    def test_a_failed_save_of_the_trust_state_leaves_the_old_one(
        self, state: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_state(STATE)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            save_state(msgspec.structs.replace(STATE, last_snapshot="f" * 64))
        assert len(list(state.iterdir())) == 1
        assert load_state(CONFIG) == STATE

    def test_the_trust_state_is_in_the_home_directory_by_default(
        self, own_home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("XDG_STATE_HOME")
        assert state_folder() == own_home / ".local" / "state" / "casfs"


class TestPin:
    @pytest.mark.parametrize("spelling", ["link", "sub/../real", "real"])
    def test_another_spelling_of_a_pinned_location_is_no_first_use(
        self, tmp_path: Path, spelling: str
    ) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "sub").mkdir()
        (tmp_path / "link").symlink_to("real")
        pin(tmp_path / "real", trust_of(CONFIG))
        with pytest.raises(TrustError, match="is an unencrypted one now"):
            verify_pin(str(tmp_path / spelling), trust_of(PLAIN))

    def test_a_pinned_symbolic_link_to_another_repository_is_no_first_use(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "link").symlink_to("one")
        pin(tmp_path / "link", trust_of(CONFIG))
        (tmp_path / "link").unlink()
        (tmp_path / "link").symlink_to("other")
        with pytest.raises(TrustError, match="is an unencrypted one now"):
            verify_pin(tmp_path / "link", trust_of(PLAIN))

    def test_a_changed_configuration_of_a_pinned_repository_is_refused(self) -> None:
        pin(self.ROOT, trust_of(CONFIG))
        for changed in (
            msgspec.structs.replace(CONFIG, chunker=ChunkerConfig(max_bytes=1 << 20)),
            msgspec.structs.replace(CONFIG, tree_seed=1),
        ):
            with pytest.raises(TrustError, match="the configuration of the repository in"):
                verify_pin(self.ROOT, trust_of(changed))

    def test_a_pin_without_the_digest_of_the_configuration_is_accepted_and_completed(
        self, state: Path
    ) -> None:
        pin(self.ROOT, trust_of(CONFIG))
        (file,) = state.iterdir()
        old = msgspec.json.decode(file.read_bytes())
        del old["config"]
        file.write_bytes(msgspec.json.encode(old))
        verify_pin(self.ROOT, trust_of(CONFIG))
        pin(self.ROOT, trust_of(CONFIG))
        assert msgspec.json.decode(file.read_bytes())["config"] == trust_of(CONFIG).config_digest

    ROOT = Path("/some/repository")

    def test_an_unknown_location_may_hold_any_repository(self) -> None:
        verify_pin(self.ROOT, trust_of(CONFIG))
        verify_pin(self.ROOT, trust_of(PLAIN))

    def test_a_pinned_repository_is_accepted_at_its_location(self) -> None:
        pin(self.ROOT, trust_of(CONFIG))
        verify_pin(self.ROOT, trust_of(CONFIG))

    @pytest.mark.parametrize(
        "config",
        [
            PLAIN,
            msgspec.structs.replace(CONFIG, id="b" * 64),
            msgspec.structs.replace(
                CONFIG, encryption=EncryptionConfig(CIPHER, "b" * 64, "d" * 64)
            ),
        ],
        ids=["unencrypted", "another", "another domain"],
    )
    def test_another_repository_at_a_pinned_location_is_refused(
        self, config: RepositoryConfig
    ) -> None:
        pin(self.ROOT, trust_of(CONFIG))
        with pytest.raises(TrustError, match="casfs key accept"):
            verify_pin(self.ROOT, trust_of(config))
        verify_pin(Path("/some/other"), trust_of(config))

    def test_an_older_format_is_refused_unless_an_earlier_time_is_read(self) -> None:
        newer = msgspec.structs.replace(CONFIG, format=NEWEST_FORMAT)
        older = msgspec.structs.replace(CONFIG, format=OLDEST_FORMAT)
        pin(self.ROOT, trust_of(newer))
        with pytest.raises(TrustError, match="an older copy of its file `config`"):
            verify_pin(self.ROOT, trust_of(older))
        verify_pin(self.ROOT, trust_of(older), is_past=True)
        with pytest.raises(TrustError):
            verify_pin(self.ROOT, trust_of(PLAIN), is_past=True)

    def test_a_pinned_location_may_have_a_name_that_is_not_text(self, tmp_path: Path) -> None:
        root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n"))
        pin(root, trust_of(CONFIG))
        verify_pin(root, trust_of(CONFIG))
        with pytest.raises(TrustError):
            verify_pin(root, trust_of(PLAIN))

    def test_a_damaged_pin_is_refused(self, state: Path) -> None:
        pin(self.ROOT, trust_of(CONFIG))
        (file,) = state.iterdir()
        for data in (b"", b"{}", b"\xff"):
            file.write_bytes(data)
            with pytest.raises(TrustError, match="is damaged"):
                verify_pin(self.ROOT, trust_of(CONFIG))


class TestTrustOfWriter:
    def test_a_writer_stores_nothing_in_a_replaced_repository_until_the_user_accepts_it(
        self, repo: EncryptedRepositoryFixture, tmp_path: Path, source: Path
    ) -> None:
        repo.back_up(source)
        shutil.rmtree(repo.root)
        create_repository(repo.root.with_name("forged"))
        repo.root.with_name("forged").rename(repo.root)
        before = stored(repo.root)
        with pytest.raises(TrustError, match="is an unencrypted one now"):
            repo.back_up(source)
        assert stored(repo.root) == before
        trust_current_recipients(
            repo.root, LocalStorage(repo.root), trust_of(read_config(repo.root))
        )
        repo.back_up(source)
        assert stored(repo.root) > before

    def test_a_writer_refuses_a_change_of_recipients_that_the_storage_made(
        self, repo: EncryptedRepositoryFixture, source: Path
    ) -> None:
        repo.back_up(source)
        storage = LocalStorage(repo.root)
        write_recipients(storage, RecipientList.of([RECIPIENT, OTHER]))
        before = stored(repo.root)
        with pytest.raises(TrustError, match="others could read later backups"):
            repo.back_up(source)
        assert stored(repo.root) == before
        accepted = trust_current_recipients(repo.root, storage, trust_of(repo.config))
        assert accepted == (RECIPIENT, OTHER)
        repo.back_up(source)

    def test_a_passphrase_is_not_tried_after_the_storage_changed_the_recipients(
        self, repo: EncryptedRepositoryFixture, source: Path
    ) -> None:
        repo.back_up(source)
        storage = LocalStorage(repo.root)
        assert require_trusted_recipients(storage, trust_of(repo.config)) == (RECIPIENT,)
        mallory = Recipient(RecipientKind.PASSPHRASE, OTHER_PUBLIC)
        write_recipients(storage, RecipientList.of([RECIPIENT, mallory]))
        with pytest.raises(TrustError, match="tried on nothing"):
            require_trusted_recipients(storage, trust_of(repo.config))
        trust_current_recipients(repo.root, storage, trust_of(repo.config))
        assert mallory in require_trusted_recipients(storage, trust_of(repo.config))
        storage.close()

    def test_a_writer_without_its_state_begins_a_domain_and_warns(
        self,
        repo: EncryptedRepositoryFixture,
        source: Path,
        state: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        first = repo.back_up(source)
        assert first.snapshot.stats.new_blobs
        shutil.rmtree(state)
        with caplog.at_level(logging.WARNING):
            second = repo.back_up(source)
        assert "has not written to this repository before" in caplog.text
        assert second.snapshot.stats.new_blobs == first.snapshot.stats.new_blobs
        with repo.reading() as repository:
            assert repository.snapshots.provenance.is_from_trusted_writer(repo.id_of(first))
            assert not repository.snapshots.provenance.is_from_trusted_writer(repo.id_of(second))

    def test_a_writer_without_its_state_but_with_an_identity_keeps_the_domain_of_the_repository(
        self, repo: EncryptedRepositoryFixture, source: Path, state: Path
    ) -> None:
        repo.back_up(source)
        before = load_state(repo.config)
        shutil.rmtree(state)
        with open_for_writing(repo.root, "test", OpenOptions(unlock=unlock, sync=False)):
            pass
        after = load_state(repo.config)
        assert before is not None and after is not None
        assert (after.domain, after.recipients) == (before.domain, before.recipients)

    def test_a_writer_warns_where_the_last_snapshot_it_published_is_missing(
        self, repo: EncryptedRepositoryFixture, source: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        result = repo.back_up(source)
        repo.back_up(source)
        assert "published" not in caplog.text
        for file in (repo.root / "snapshots").iterdir():
            if file.name != repo.id_of(result).hex():
                file.unlink()
        repo.back_up(source)
        assert "is missing: it was removed" in caplog.text
        assert "rolled back to an earlier state" in caplog.text

    def test_a_writer_does_not_warn_of_a_snapshot_it_removed_itself(
        self, repo: EncryptedRepositoryFixture, source: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        result = repo.back_up(source)
        with open_for_writing(
            repo.root, "forget", OpenOptions(unlock=unlock, sync=False)
        ) as repository:
            repository.snapshots.delete(repo.id_of(result))
        repo.back_up(source)
        assert "is missing: it was removed" not in caplog.text

    def test_a_writer_can_require_exact_recipients(self) -> None:
        current = RecipientList.of([RECIPIENT])
        require_recipients(current, [RECIPIENT])
        for wrong in ([OTHER], [RECIPIENT, OTHER], []):
            with pytest.raises(TrustError, match="recipients differ from the file"):
                require_recipients(current, wrong)

    def test_a_gpg_recipient_with_another_age_key_than_that_of_the_file_is_refused(self) -> None:
        real = Recipient(RecipientKind.GPG, GPG_FINGERPRINT, PUBLIC, GPG_KEY)
        forged = msgspec.structs.replace(real, age=OTHER_PUBLIC)
        require_recipients(RecipientList.of([real]), [real])
        for expected in (real, msgspec.structs.replace(real, age="")):
            with pytest.raises(TrustError, match=f"only the repository has: {OTHER_PUBLIC}"):
                require_recipients(RecipientList.of([forged]), [expected])

    def test_a_writer_begins_one_session_with_the_first_blob_it_stores(
        self, repo: EncryptedRepositoryFixture
    ) -> None:
        config = repo.config
        storage = LocalStorage(repo.root, writer="test", sync=False)
        key_manager = KeyManager.for_writing(repo.root, storage, trust_of(config), Identities())
        sessions = repo.root / "sessions"
        assert len(list(sessions.iterdir())) == 1
        session = key_manager.session()
        assert key_manager.session() is session
        assert len(list(sessions.iterdir())) == 2
        reader = KeyManager.for_reading(storage, config, identities())
        assert reader.keyring.session(session.id) == session
        with pytest.raises(ValueError, match="open for reading"):
            reader.session()
