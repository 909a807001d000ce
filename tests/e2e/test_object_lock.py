"""Repositories in a bucket that keeps versions and locks them, on SeaweedFS, with the installed command."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from casfs.backup.relied_packs import ReliedPacks
from casfs.errors import StorageDeniedError
from casfs.format.versions import NEWEST_FORMAT, OLDEST_FORMAT
from casfs.repository.creation import create_repository
from casfs.repository.object_locks import lock_end_s
from casfs.repository.opening import open_for_reading
from casfs.repository.place import RemotePlace
from casfs.storage.base import Storage, StorageOptions
from casfs.storage.bucket import Bucket
from casfs.storage.remote import open_storage
from casfs.storage.url import parse_address
from casfs.store.blob_store import pack_name
from tests.e2e.test_json_reference import differences, read_page
from tests.support.cli import Casfs
from tests.support.comparing import tree_differences
from tests.support.mounts import mounted
from tests.support.remote import RemoteCasfs, on_s3
from tests.support.servers import S3Server, seaweedfs
from tests.support.thief import delete_everything, overwrite_everything

MIB = 1 << 20
BUCKET = "locked"

_serials = itertools.count()

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    with seaweedfs() as server:
        server.make_locking_bucket(BUCKET)
        server.make_bucket("plain")
        yield server


@dataclass(frozen=True, slots=True)
class Vault:
    """A host, and its repository as the keys of the bucket's owner show it."""

    casfs: RemoteCasfs
    server: S3Server
    prefix: str
    storage: Storage

    @property
    def bucket(self) -> Bucket:
        assert self.storage.bucket is not None
        return self.storage.bucket

    def now(self) -> str:
        """Return a time by the server's clock between what was done and what will be done."""
        self.storage.write("clock", b"1")
        now_s = self.storage.mtime_ns("clock") // 1_000_000_000
        while self.storage.mtime_ns("clock") // 1_000_000_000 == now_s:
            self.storage.write("clock", b"1")
            time.sleep(0.05)
        return f"@{now_s}"


def _owner(server: S3Server) -> StorageOptions:
    return StorageOptions(
        endpoint=server.endpoint,
        access_key_id=server.access_key_id,
        secret_access_key=server.secret_access_key,
    )


@pytest.fixture
def vault(s3_server: S3Server, casfs: Casfs) -> Iterator[Vault]:
    prefix = f"r{next(_serials)}"
    host = on_s3(s3_server, BUCKET, prefix, casfs.home)
    storage = open_storage(parse_address(host.url), _owner(s3_server), env={})
    yield Vault(host, s3_server, prefix, storage)
    storage.close()


@pytest.mark.parametrize(
    ("attack", "encrypted"), [(delete_everything, False), (overwrite_everything, True)]
)
@pytest.mark.fuse
def test_what_a_thief_deleted_or_overwrote_is_restored_as_of_the_time_before(
    vault: Vault,
    source: Path,
    tmp_path: Path,
    attack: Callable[[S3Server, str, str], int],
    encrypted: bool,
) -> None:
    key: tuple[str | Path, ...] = ()
    if encrypted:
        (tmp_path / "passphrase").write_text("right")
        key = ("--passphrase-file", tmp_path / "passphrase")
    (source / "large").write_bytes(random.Random(1).randbytes(9 * MIB))
    vault.casfs.run("init", *(("--passphrase", *key) if encrypted else ()))
    vault.casfs.run("backup", *key, ".", cwd=source)
    before = vault.now()
    assert attack(vault.server, BUCKET, vault.prefix) > 5
    vault.casfs.run("snapshots", *key, expect=1)
    then = ("--as-of", before, *key)
    vault.casfs.run("restore", *then, "latest", "--target", tmp_path / "back")
    assert tree_differences(source, tmp_path / "back") == []
    assert "large" in vault.casfs.run("ls", *then, "latest").text
    assert len(vault.casfs.run("snapshots", *then, "--json").of_type("snapshot")) == 1
    vault.casfs.run("check", *then, "--read-data")
    with mounted(vault.casfs, "latest", *then, at=tmp_path / "at") as at:
        assert tree_differences(source, at) == []
    other = vault.casfs.host(tmp_path / "other home")
    other.run("mirror", "--as-of", before, tmp_path / "rescued")
    Casfs(tmp_path / "rescued", other.home).run(
        "restore", *key, "latest", "--target", tmp_path / "rescued tree"
    )
    assert tree_differences(source, tmp_path / "rescued tree") == []


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_repository_is_read_as_it_was_before_an_upgrade_and_as_it_is_after_it(
    vault: Vault, source: Path, tmp_path: Path, encrypted: bool
) -> None:
    (tmp_path / "passphrase").write_text("right")
    key = ("--passphrase-file", str(tmp_path / "passphrase")) if encrypted else ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(vault.casfs.home / ".local" / "state"))
        create_repository(
            RemotePlace(parse_address(vault.casfs.url), _owner(vault.server)),
            passphrase="right" if encrypted else None,
            format_=OLDEST_FORMAT,
        )
    vault.casfs.run("backup", *key, ".", cwd=source)
    shutil.copytree(source, tmp_path / "earlier", symlinks=True)
    before = vault.now()
    upgraded = vault.casfs.run("upgrade", "--json").one("upgrade")
    assert (upgraded["old_format"], upgraded["new_format"]) == (OLDEST_FORMAT, NEWEST_FORMAT)
    (source / "readme.txt").write_bytes(b"written after the upgrade\n")
    vault.casfs.run("backup", *key, ".", cwd=source)
    vault.casfs.run("forget", "--keep-last", "1", "--prune", *key)
    # The index of earlier times is one, whatever their order and the format.
    for number, (options, expected) in enumerate(
        [
            (("--as-of", before), tmp_path / "earlier"),
            (("--as-of", vault.now()), source),
            (("--as-of", before), tmp_path / "earlier"),
            ((), source),
        ]
    ):
        back = tmp_path / f"back {number}"
        vault.casfs.run("restore", *options, *key, "latest", "--target", back)
        assert tree_differences(expected, back) == []
        vault.casfs.run("check", *options, *key, "--read-data")
    vault.casfs.run("backup", *key, ".", cwd=source)


def test_a_time_before_the_repository_was_made_shows_none(vault: Vault) -> None:
    before = vault.now()
    vault.casfs.run("init")
    result = vault.casfs.run("snapshots", "--as-of", before, expect=1)
    assert "there is no repository in" in result.complaint


def test_places_without_versions_refuse_an_earlier_time(
    s3_server: S3Server, casfs: Casfs, tmp_path: Path
) -> None:
    plain = on_s3(s3_server, "plain", "r", casfs.home)
    plain.run("init")
    result = plain.run("snapshots", "--as-of", "@1", expect=1)
    assert "keeps no versions, so what was there at an earlier time is lost" in result.complaint
    local = Casfs(tmp_path / "local", casfs.home)
    local.run("init")
    result = local.run("snapshots", "--as-of", "@1", expect=2)
    assert "--as-of reads the versions of objects in an S3 bucket" in result.complaint
    far = casfs.at(None).run("-r", "sftp://host/r", "ls", "latest", "--as-of", "@1", expect=1)
    assert "--as-of reads the versions of objects in an S3 bucket" in far.complaint


def in_repository(vault: Vault) -> dict[str, int]:
    """Return until when each object of the repository is locked, 0 for one that is not."""
    names = {
        version.name
        for folder in ("packs", "meta", "snapshots", "lock-policies", "sessions", "config")
        for version in vault.bucket.versions(folder)
        if not version.is_deletion
    }
    return {name: vault.bucket.locked_until_s(name) or 0 for name in sorted(names)}


def test_all_that_a_snapshot_needs_is_locked_and_the_server_refuses_to_remove_it(
    vault: Vault, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "passphrase").write_text("right")
    key = ("--passphrase-file", tmp_path / "passphrase")
    (source / "large").write_bytes(random.Random(1).randbytes(70 * MIB))
    vault.casfs.run("init", "--passphrase", *key, "--lock-for", "1h")
    began_s = int(time.time())
    done = vault.casfs.run("backup", *key, "--json", ".", cwd=source)
    assert done.one("snapshot")["not_locked"] == 0
    locked = in_repository(vault)
    assert {name.partition("/")[0] for name in locked} >= {
        "config",
        "lock-policies",
        "packs",
        "sessions",
        "snapshots",
    }
    for name, until_s in locked.items():
        assert began_s + 3600 <= until_s <= time.time() + 3600 + 900, name
    for name in locked:
        for version in vault.bucket.versions(name):
            status = vault.server.delete_version(BUCKET, f"{vault.prefix}/{name}", version.version)
            assert status == 403, name
    checked = vault.casfs.run("check", *key, "--json")
    assert [one["snapshot"] for one in checked.of_type("lock")] == [done.one("snapshot")["id"]]
    assert checked.one("lock")["locked_until"] == done.one("snapshot")["locked_until"]
    assert differences(checked.one("lock"), read_page()[0]["check", "lock"]) == []
    assert checked.of_type("short_lock") == []
    text = vault.casfs.run("backup", *key, ".", cwd=source).text
    assert re.search(r"^locked until \d{4}-.*: no credential can remove it before$", text, re.M)
    text = vault.casfs.run("check", *key).text
    assert len(re.findall(r"^snapshot [0-9a-f]+ is locked until \d{4}-", text, re.M)) == 2


def test_a_backup_of_a_later_period_extends_what_it_relies_on_and_nothing_else(
    vault: Vault, source: Path, tmp_path: Path
) -> None:
    vault.casfs.run("init", "--lock-for", "40s")
    (source / "forgotten").write_bytes(random.Random(2).randbytes(1 * MIB))
    first = vault.casfs.run("backup", "--json", "forgotten", cwd=source)
    (source / "needed").write_bytes(random.Random(1).randbytes(1 * MIB))
    (source / "forgotten").unlink()
    vault.casfs.run("backup", ".", cwd=source)
    before = in_repository(vault)
    again = vault.casfs.run("backup", "--json", ".", cwd=source)
    if again.one("snapshot")["locked_until"] == first.one("snapshot")["locked_until"]:
        assert again.one("requests")["lock"]["requests"] == 1  # the snapshot itself
    vault.casfs.run("forget", first.one("snapshot")["id"])
    period_end_s = lock_end_s(int(time.time()), 40)
    while lock_end_s(int(time.time()), 40) == period_end_s:
        time.sleep(0.2)
    vault.casfs.run("backup", ".", cwd=source)
    after = in_repository(vault)
    packs = [name for name in before if name.startswith(("packs/", "meta/"))]
    extended = [name for name in packs if after[name] > before[name]]
    assert extended and len(extended) < len(packs)
    newest = max(
        (name for name in after if name.startswith("snapshots/")), key=lambda name: after[name]
    )
    assert min(after[name] for name in extended) >= after[newest] > max(before.values())
    needed = needed_packs(vault, tmp_path)
    assert set(extended) == needed


def needed_packs(vault: Vault, tmp_path: Path) -> set[str]:
    """Return the packs that the newest snapshot needs, from an index of its own."""
    place = RemotePlace(
        parse_address(vault.casfs.url),
        StorageOptions(
            endpoint=vault.server.endpoint,
            access_key_id=vault.server.access_key_id,
            secret_access_key=vault.server.secret_access_key,
        ),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "own cache"))
        with open_for_reading(place) as repository:
            _, snapshot = repository.snapshots.resolve("latest")
            relied = ReliedPacks(
                repository, {one.ordinal for one in repository.store.index.packs()}
            )
            assert snapshot.root.tree is not None
            relied.add(snapshot.root.tree)
            return {pack_name(repository.store.index.pack_ref(ordinal)) for ordinal in relied.found}


def test_a_credential_that_may_not_lock_backs_up_and_says_that_nothing_is_protected(
    s3_server: S3Server, casfs: Casfs, source: Path, tmp_path: Path
) -> None:
    s3_server.make_locking_bucket("no-retention")
    remote = on_s3(s3_server, "no-retention", "r", casfs.home)
    remote.run("init", "--lock-for", "1h")
    s3_server.put_policy("no-retention", _deny("no-retention", "s3:PutObjectRetention"))
    assert "not locked" not in remote.run("check").text
    result = remote.run("backup", "--json", ".", cwd=source, expect=3)
    assert result.one("snapshot")["locked_until"] is None
    assert result.one("snapshot")["not_locked"] > 1
    assert "the snapshot is not protected" in result.complaint
    assert "the credentials do not allow it" in result.complaint
    assert "1 snapshot is not locked" in remote.run("check").text
    remote.run("restore", "latest", "--target", tmp_path / "back")
    assert tree_differences(source, tmp_path / "back") == []


def _deny(bucket: str, *actions: str) -> bytes:
    statement = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": list(actions),
        "Resource": f"arn:aws:s3:::{bucket}/*",
    }
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]}).encode()


def test_a_write_only_credential_backs_up_with_locks_and_can_remove_nothing(
    s3_server: S3Server, casfs: Casfs, source: Path, tmp_path: Path
) -> None:
    s3_server.make_locking_bucket("write-only")
    remote = on_s3(s3_server, "write-only", "r", casfs.home)
    remote.run("init", "--lock-for", "1h")
    denied = _deny("write-only", "s3:DeleteObject", "s3:DeleteObjectVersion")
    s3_server.put_policy("write-only", denied)
    for _ in range(2):
        done = remote.run("backup", "--json", ".", cwd=source)
        assert done.one("snapshot")["locked_until"] is not None
        assert done.complaint == ""
    options = StorageOptions(
        endpoint=s3_server.endpoint,
        access_key_id=s3_server.access_key_id,
        secret_access_key=s3_server.secret_access_key,
    )
    storage = open_storage(parse_address(remote.url), options, env={})
    vault = Vault(remote, s3_server, "r", storage)
    before = vault.now()
    for name in in_repository(vault):
        with pytest.raises(StorageDeniedError):
            storage.delete(name)
        (version,) = vault.bucket.versions(name)
        assert s3_server.delete_version("write-only", f"r/{name}", version.version) == 403
    overwrite_everything(s3_server, "write-only", "r")
    storage.close()
    remote.run("restore", "latest", "--as-of", before, "--target", tmp_path / "back")
    assert tree_differences(source, tmp_path / "back") == []


def test_the_policy_is_shown_and_changed_and_every_host_is_asked_to_accept_a_change(
    vault: Vault, source: Path, tmp_path: Path
) -> None:
    vault.casfs.run("init", "--lock-for", "1h")
    vault.casfs.run("backup", ".", cwd=source)
    other = vault.casfs.host(tmp_path / "other home")
    other.run("backup", ".", cwd=source)
    assert "locked for 1 h" in other.run("lock-policy").text
    changed = vault.casfs.run("lock-policy", "--lock-for", "2h", "--json").one("lock_policy")
    assert changed["lock_for_seconds"] == 7200
    documented, _ = read_page()
    assert differences(changed, documented["lock-policy", "lock_policy"]) == []
    vault.casfs.run("backup", ".", cwd=source)
    result = other.run("backup", ".", cwd=source)
    assert "shows a lock policy of 2 h, and this machine knows a lock policy of 1 h" in (
        result.complaint
    )
    other.run("key", "accept")
    assert other.run("backup", ".", cwd=source).complaint == ""
    vault.casfs.run("lock-policy", "--off")
    done = vault.casfs.run("backup", "--json", ".", cwd=source).one("snapshot")
    assert done["locked_until"] is None
    assert done["not_locked"] == 0


def test_a_hidden_policy_is_noticed_and_locks_go_on(vault: Vault, source: Path) -> None:
    vault.casfs.run("init", "--lock-for", "1h")
    vault.casfs.run("backup", ".", cwd=source)
    for entry in list(vault.storage.list("lock-policies")):
        vault.storage.delete(entry.name)
    result = vault.casfs.run("backup", "--json", ".", cwd=source)
    assert "shows no lock policy, and this machine knows a lock policy of 1 h" in result.complaint
    assert result.one("snapshot")["locked_until"] is not None


def test_places_that_cannot_lock_refuse_a_policy_before_anything_is_created(
    s3_server: S3Server, casfs: Casfs, tmp_path: Path
) -> None:
    plain = on_s3(s3_server, "plain", "unlocked", casfs.home)
    result = plain.run("init", "--lock-for", "1h", expect=1)
    assert "does not lock objects" in result.complaint
    assert "there is no repository" in plain.run("snapshots", expect=1).complaint
    local = Casfs(tmp_path / "local", casfs.home)
    for command in (("init", "--lock-for", "1h"), ("lock-policy",)):
        if command[0] == "lock-policy":
            local.run("init")
        result = local.run(*command, expect=2)
        assert "objects are locked in an S3 bucket" in result.complaint
    assert "at most 3660 d" in plain.run("init", "--lock-for", "9999d", expect=2).complaint
    assert "locks nothing" in plain.run("init", "--lock-for", "0s", expect=2).complaint


def test_a_prune_says_until_when_locked_packs_stay(vault: Vault, source: Path) -> None:
    vault.casfs.run("init", "--lock-for", "1h")
    (source / "forgotten").write_bytes(random.Random(2).randbytes(1 * MIB))
    first = vault.casfs.run("backup", "--json", "forgotten", cwd=source).one("snapshot")
    (source / "forgotten").unlink()
    vault.casfs.run("backup", ".", cwd=source)
    vault.casfs.run("forget", first["id"])
    before = in_repository(vault)
    pruned = vault.casfs.run("prune", "--margin", "0s", "--json").one("prune")
    assert pruned["locked_packs"] > 0
    assert pruned["locked_until"] == first["locked_until"]
    assert pruned["removed_packs"] == pruned["marked_packs"] == 0
    text = vault.casfs.run("prune", "--margin", "0s").text
    assert re.search(r"packs? \(.*\) stays? until \d{4}-.* at the latest, because of locks", text)
    assert before.keys() <= in_repository(vault).keys()


def test_a_thief_without_the_right_to_delete_is_refused_by_a_sentence(
    s3_server: S3Server, casfs: Casfs, source: Path
) -> None:
    s3_server.make_bucket("no-delete")
    remote = on_s3(s3_server, "no-delete", "r", casfs.home)
    remote.run("init")
    (source / "forgotten").write_bytes(random.Random(2).randbytes(1 * MIB))
    first = remote.run("backup", "--json", "forgotten", cwd=source).one("snapshot")
    (source / "forgotten").unlink()
    remote.run("backup", ".", cwd=source)
    remote.run("forget", first["id"])
    # The process below leaves its presence object, and what is as old as that may be its own: the server
    # tells times in whole seconds.
    storage = open_storage(parse_address(remote.url), _owner(s3_server), env={})
    Vault(remote, s3_server, "r", storage).now()
    storage.close()
    s3_server.put_policy("no-delete", _deny("no-delete", "s3:DeleteObject"))
    assert remote.run("forget", "latest", "--unsafe-allow-remove-all", expect=1).complaints
    marked = remote.run("prune", "--margin", "0s", "--json").one("prune")
    assert (marked["in_flight_packs"], marked["removed_packs"]) == (0, 0)
    assert marked["marked_packs"] > 0
    result = remote.run("prune", "--margin", "0s", expect=1)
    assert "the credentials do not allow it" in result.complaint
    assert len(result.complaints) == 1
    remote.run("check", "--read-data")
