"""Credentials of Google Cloud Storage and Azure: from the configuration, else from the usual variables.

`credentials-command` of the configuration prints, for Google, the JSON of a service account; for Azure, lines
`NAME=VALUE` with the names of the usual variables. What it does not print is taken from the environment of
this process by `obstore`. The command runs once for each process.
"""

from __future__ import annotations

import errno
import subprocess
from typing import TYPE_CHECKING, Any

from casfs.errors import StorageDeniedError
from casfs.json_document import InvalidJsonError, parse_json
from casfs.storage.base import StorageOptions

if TYPE_CHECKING:
    from obstore.store import AzureConfig, GCSConfig

_COMMAND_TIMEOUT_S = 120


def run_command(command: str, place: str) -> str:
    """Return the output of a credentials-command; raise StorageDeniedError where it fails."""
    try:
        done = subprocess.run(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=_COMMAND_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise denied(
            place, f"the credentials-command did not end in {_COMMAND_TIMEOUT_S} s"
        ) from error
    if done.returncode != 0:
        raise denied(place, f"the credentials-command failed with exit code {done.returncode}")
    return done.stdout.decode("utf-8", "replace")


def parse_variables(text: str) -> dict[str, str]:
    """Return the values of lines `NAME=VALUE`, which may begin with `export`."""
    lines = [line.removeprefix("export ").strip() for line in text.splitlines()]
    return {name: value.strip("\"'") for name, _, value in (line.partition("=") for line in lines)}


def gcs_config(options: StorageOptions) -> GCSConfig:
    """Return the settings of Google Cloud Storage from the configuration; raise StorageDeniedError."""
    config: GCSConfig = {}
    if options.endpoint is not None:
        config["base_url"] = options.endpoint
    if options.credentials_command is None:
        return config
    text = run_command(options.credentials_command, "GCS")
    try:
        found = parse_json(text.encode(), dict[str, Any])
    except InvalidJsonError:
        found = {}
    if "private_key" not in found:
        raise denied(
            "GCS", "the credentials-command did not print the JSON of a service account's key"
        )
    config["service_account_key"] = text
    return config


def azure_config(options: StorageOptions) -> AzureConfig:
    """Return the settings of Azure from the configuration; raise StorageDeniedError."""
    config: AzureConfig = {}
    if options.endpoint is not None:
        config["endpoint"] = options.endpoint
    if options.account is not None:
        config["account_name"] = options.account
    if options.credentials_command is None:
        return config
    values = parse_variables(run_command(options.credentials_command, "Azure"))
    found = {name: value for name, value in values.items() if name.startswith("AZURE_")}
    if not found:
        raise denied(
            "Azure",
            "the credentials-command printed no credentials; it has to print AZURE_STORAGE_ACCOUNT_KEY=…, or "
            "AZURE_STORAGE_SAS_TOKEN=…, or AZURE_STORAGE_CLIENT_ID=…, …_CLIENT_SECRET=… and …_TENANT_ID=…",
        )
    if "AZURE_STORAGE_ACCOUNT_NAME" in found:
        config["account_name"] = found["AZURE_STORAGE_ACCOUNT_NAME"]
    if "AZURE_STORAGE_ACCOUNT_KEY" in found:
        config["account_key"] = found["AZURE_STORAGE_ACCOUNT_KEY"]
    if "AZURE_STORAGE_SAS_TOKEN" in found:
        config["sas_key"] = found["AZURE_STORAGE_SAS_TOKEN"]
    if "AZURE_STORAGE_CLIENT_ID" in found:
        config["client_id"] = found["AZURE_STORAGE_CLIENT_ID"]
    if "AZURE_STORAGE_CLIENT_SECRET" in found:
        config["client_secret"] = found["AZURE_STORAGE_CLIENT_SECRET"]
    if "AZURE_STORAGE_TENANT_ID" in found:
        config["tenant_id"] = found["AZURE_STORAGE_TENANT_ID"]
    return config


def denied(place: str, sentence: str) -> StorageDeniedError:
    """Return the error of unusable credentials."""
    return StorageDeniedError("use", place, OSError(errno.EACCES, sentence))
