"""The storage in Azure keeps the contract; its server is Azurite, where it is installed."""

from __future__ import annotations

import itertools
import shlex
import shutil
from collections.abc import Iterator

import pytest

from casfs.errors import StorageDeniedError
from casfs.storage.base import Storage, StorageOptions
from casfs.storage.probe import probe_storage
from casfs.storage.remote import open_storage
from casfs.storage.url import parse_address
from tests.support.servers import AZURITE, AzureServer, azurite

from .contract import StorageContract

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which(AZURITE) is None, reason="needs Azurite: npm install --global azurite"
    ),
]

_serials = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[AzureServer]:
    with azurite() as running:
        running.make_container("casfs")
        yield running


def options(server: AzureServer, key: str) -> StorageOptions:
    """Return the options that a configuration gives, with a command that prints a key."""
    return StorageOptions(
        endpoint=server.endpoint,
        account=server.account,
        credentials_command=shlex.join(["echo", f"AZURE_STORAGE_ACCOUNT_KEY={key}"]),
    )


@pytest.fixture
def storage(server: AzureServer) -> Iterator[Storage]:
    address = parse_address(f"az://casfs/r{next(_serials)}")
    opened = open_storage(address, options(server, server.key))
    yield opened
    opened.close()


class TestAzureContract(StorageContract):
    """Azure keeps the contract of every storage."""


def test_the_probe_of_azure_finds_conditional_writes(storage: Storage) -> None:
    found = probe_storage(storage)
    assert (found.creates_exclusively, found.can_overwrite, found.can_delete) == (True, True, True)


def test_a_wrong_key_of_azure_is_one_sentence(server: AzureServer) -> None:
    wrong = server.key.replace("E", "F")
    storage = open_storage(parse_address("az://casfs/r"), options(server, wrong))
    with pytest.raises(
        StorageDeniedError, match=r"the credentials (are not accepted|do not allow it)"
    ):
        storage.create("config", b"x")
    storage.close()


def test_a_missing_container_is_one_sentence(server: AzureServer) -> None:
    storage = open_storage(parse_address("az://missing/r"), options(server, server.key))
    with pytest.raises(StorageDeniedError, match="there is no such bucket"):
        storage.create("config", b"x")
    storage.close()
