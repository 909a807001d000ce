"""The clients of `obstore` for S3, GCS and Azure, made from casfs's options."""

from __future__ import annotations

import errno
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from obstore.store import AzureStore, GCSStore, S3Store

from casfs import __version__
from casfs.errors import StorageDeniedError
from casfs.storage.aws_settings import AwsSettings, aws_settings, run_credentials_command
from casfs.storage.base import StorageOptions
from casfs.storage.cloud_credentials import azure_config, gcs_config
from casfs.storage.object_store_errors import ERRORS

if TYPE_CHECKING:
    from obstore.store import (
        ClientConfig,
        ObjectStore,
        RetryConfig,
        S3Config,
        S3Credential,
        S3CredentialProvider,
    )

_CONNECT_TIMEOUT = timedelta(seconds=15)

_NO_RETRIES: RetryConfig = {"max_retries": 0}


def s3_clients(bucket: str, options: StorageOptions) -> Callable[[int], ObjectStore]:
    """Return a factory of clients of an S3 bucket; raise StorageDeniedError if there are no credentials."""
    settings = aws_settings(options)
    config: S3Config = {
        "region": settings.region,
        "virtual_hosted_style_request": settings.endpoint is None or options.virtual_hosted,
        # One deletion is one request that every server knows, and that a policy can deny.
        "disable_bulk_delete": True,
        "conditional_put": "etag",
    }
    if settings.endpoint is not None:
        config["endpoint"] = _virtual_endpoint(settings.endpoint, bucket, options)
    else:
        # AWS takes no object without a checksum into a bucket that locks every new object.
        config["checksum_algorithm"] = "sha256"
    provider = _provider(settings)

    def make(timeout_s: int) -> ObjectStore:
        client = _client_options(timeout_s, options, settings.endpoint)
        return S3Store(
            bucket,
            config=config,
            client_options=client,
            retry_config=_NO_RETRIES,
            credential_provider=provider,
        )

    return make


def gcs_clients(bucket: str, options: StorageOptions) -> Callable[[int], ObjectStore]:
    """Return a factory of clients of a bucket of Google Cloud Storage."""
    config = cache(lambda: gcs_config(options))

    def make(timeout_s: int) -> ObjectStore:
        client = _client_options(timeout_s, options, options.endpoint)
        return _make_client(
            lambda: GCSStore(
                bucket, client_options=client, retry_config=_NO_RETRIES, config=config()
            ),
            "GCS",
        )

    return make


def azure_clients(container: str, options: StorageOptions) -> Callable[[int], ObjectStore]:
    """Return a factory of clients of an Azure container."""
    config = cache(lambda: azure_config(options))

    def make(timeout_s: int) -> ObjectStore:
        client = _client_options(timeout_s, options, options.endpoint)
        return _make_client(
            lambda: AzureStore(
                container, client_options=client, retry_config=_NO_RETRIES, config=config()
            ),
            "Azure",
        )

    return make


def _make_client(make: Callable[[], ObjectStore], what: str) -> ObjectStore:
    try:
        return make()
    except ERRORS as error:
        reason = str(error).partition("\n")[0][:300]
        raise StorageDeniedError("use", what, OSError(errno.EACCES, reason)) from error


def _client_options(timeout_s: int, options: StorageOptions, endpoint: str | None) -> ClientConfig:
    client: ClientConfig = {
        "timeout": timedelta(seconds=timeout_s),
        "connect_timeout": _CONNECT_TIMEOUT,
        "user_agent": f"casfs/{__version__}",
    }
    if endpoint is not None and endpoint.startswith("http://"):
        client["allow_http"] = True
    if options.ca_file is not None:
        try:
            client["root_certificate"] = Path(options.ca_file).read_bytes()
        except OSError as error:
            raise StorageDeniedError("read", options.ca_file, error) from error
    return client


def _virtual_endpoint(endpoint: str, bucket: str, options: StorageOptions) -> str:
    """Return the endpoint for obstore: with the bucket in the host name if the options say so."""
    endpoint = endpoint.rstrip("/")
    if not options.virtual_hosted:
        return endpoint
    scheme, _, host = endpoint.partition("://")
    return endpoint if host.startswith(f"{bucket}.") else f"{scheme}://{bucket}.{host}"


def _provider(settings: AwsSettings) -> S3CredentialProvider | None:
    """Return obstore's source of credentials, so that obstore reads none from the environment."""
    command, known = settings.command, settings.credentials
    if command is None and known is None:
        return None

    def provide() -> S3Credential:
        found = run_credentials_command(command) if command is not None else known
        assert found is not None
        return {
            "access_key_id": found.access_key_id,
            "secret_access_key": found.secret_access_key,
            "token": found.session_token,
            "expires_at": found.expires_at,
        }

    return provide
