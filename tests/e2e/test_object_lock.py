"""Repositories in a bucket that keeps versions and locks them, on SeaweedFS, with the installed command."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from casfs.storage.base import Storage, StorageOptions
from casfs.storage.bucket import Bucket
from casfs.storage.url import open_storage, parse_address
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


@pytest.fixture
def vault(s3_server: S3Server, casfs: Casfs) -> Iterator[Vault]:
    prefix = f"r{next(_serials)}"
    host = on_s3(s3_server, BUCKET, prefix, casfs.home)
    options = StorageOptions(
        endpoint=s3_server.endpoint,
        access_key_id=s3_server.access_key_id,
        secret_access_key=s3_server.secret_access_key,
    )
    storage = open_storage(parse_address(host.url), options, env={})
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
