"""Credentials of Google Cloud Storage and Azure from the configuration."""

from __future__ import annotations

import json
import shlex

import pytest

from casfs.errors import StorageDeniedError
from casfs.storage.base import StorageOptions
from casfs.storage.cloud_credentials import azure_config, gcs_config

SERVICE_ACCOUNT = json.dumps(
    {"client_email": "a@b", "private_key": "secret", "private_key_id": "1"}
)


def printing(*lines: str) -> StorageOptions:
    """Return options whose command prints lines."""
    return StorageOptions(credentials_command=shlex.join(["printf", "%s\\n", *lines]))


def test_without_a_command_the_usual_variables_decide() -> None:
    assert gcs_config(StorageOptions()) == {}
    assert azure_config(StorageOptions()) == {}


def test_a_service_account_of_google_is_taken_as_printed() -> None:
    found = gcs_config(printing(SERVICE_ACCOUNT))
    assert json.loads(found["service_account_key"]) == json.loads(SERVICE_ACCOUNT)


@pytest.mark.parametrize("text", ["", "no JSON", "[]", '{"client_email": "a@b"}'])
def test_what_is_no_service_account_is_refused(text: str) -> None:
    with pytest.raises(StorageDeniedError, match="JSON of a service account"):
        gcs_config(printing(text))


def test_each_way_into_an_account_of_azure_is_taken() -> None:
    options = printing(
        "export AZURE_STORAGE_ACCOUNT_NAME=mine",
        "AZURE_STORAGE_ACCOUNT_KEY='a2V5'",
        'AZURE_STORAGE_SAS_TOKEN="sv=1&sig=2="',
        "AZURE_STORAGE_CLIENT_ID=id",
        "AZURE_STORAGE_CLIENT_SECRET=secret",
        "AZURE_STORAGE_TENANT_ID=tenant",
        "OTHER=1",
    )
    assert azure_config(options) == {
        "account_name": "mine",
        "account_key": "a2V5",
        "sas_key": "sv=1&sig=2=",
        "client_id": "id",
        "client_secret": "secret",
        "tenant_id": "tenant",
    }


def test_the_account_and_the_endpoint_of_the_configuration_are_used() -> None:
    options = StorageOptions(endpoint="https://example.org", account="mine")
    assert azure_config(options) == {"endpoint": "https://example.org", "account_name": "mine"}
    assert gcs_config(options) == {"base_url": "https://example.org"}


def test_a_command_that_prints_no_key_of_azure_is_refused() -> None:
    with pytest.raises(StorageDeniedError, match="AZURE_STORAGE_ACCOUNT_KEY="):
        azure_config(printing("AWS_ACCESS_KEY_ID=x"))


@pytest.mark.parametrize(
    ("command", "message"),
    [("exit 3", "exit code 3"), ("printf '\\377'", "did not print|printed no")],
)
def test_a_command_that_fails_is_one_sentence(command: str, message: str) -> None:
    options = StorageOptions(credentials_command=command)
    with pytest.raises(StorageDeniedError, match=message):
        gcs_config(options)
    with pytest.raises(StorageDeniedError, match=message):
        azure_config(options)
