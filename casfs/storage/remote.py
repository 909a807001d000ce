"""Open the storage of a remote place: its protocol, with retries, request counts and rate limits."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

from casfs.storage.base import Storage, StorageOptions
from casfs.storage.counting import RequestCounter
from casfs.storage.limits import LimitedStorage, RateLimit
from casfs.storage.retry import Retrier, RetryingStorage, RetryPolicy
from casfs.storage.url import Scheme, StorageAddress

if TYPE_CHECKING:
    from casfs.storage.sftp import SftpStorage


def open_storage(
    address: StorageAddress,
    options: StorageOptions,
    counter: RequestCounter | None = None,
    env: Mapping[str, str] | None = None,
) -> Storage:
    """Return the storage of a remote place with retries, counts and rate limits, before its first request.

    Raise StorageDeniedError if there are no credentials. `local.LocalStorage` opens a local place.
    """
    env = env if env is not None else os.environ
    storage = _open_plain(address, options, counter, env)
    if options.upload_bytes_per_s or options.download_bytes_per_s:
        storage = LimitedStorage(
            storage,
            RateLimit(options.upload_bytes_per_s) if options.upload_bytes_per_s else None,
            RateLimit(options.download_bytes_per_s) if options.download_bytes_per_s else None,
        )
    policy = RetryPolicy(options.patience_s, options.first_patience_s)
    return RetryingStorage(storage, Retrier(policy))


def _open_plain(
    address: StorageAddress,
    options: StorageOptions,
    counter: RequestCounter | None,
    env: Mapping[str, str],
) -> Storage:
    if address.scheme is Scheme.FILE:
        raise ValueError("a local place has a storage of its own")
    if address.scheme is Scheme.SFTP:
        return _open_sftp(address, options, counter, env)
    # The library of object storages takes long to load: import it only where it is used.
    from casfs.storage import object_store, object_store_clients

    make_clients = {
        Scheme.S3: object_store_clients.s3_clients,
        Scheme.GCS: object_store_clients.gcs_clients,
        Scheme.AZURE: object_store_clients.azure_clients,
    }[address.scheme]
    bucket = None
    if address.scheme is Scheme.S3:
        from casfs.storage.s3_bucket import S3Bucket
        from casfs.storage.s3_connection import S3Connection

        bucket = S3Bucket(
            str(address),
            address.path,
            lambda: S3Connection(address.bucket, options),
            counter if counter is not None else RequestCounter(),
        )
    return object_store.ObjectStorage(
        str(address), address.path, make_clients(address.bucket, options), counter, bucket
    )


def _open_sftp(
    address: StorageAddress,
    options: StorageOptions,
    counter: RequestCounter | None,
    env: Mapping[str, str],
) -> SftpStorage:
    from casfs.storage.sftp import SftpStorage

    return SftpStorage(str(address), address.path, ssh_command(address, options, env), counter)


def ssh_command(
    address: StorageAddress, options: StorageOptions, env: Mapping[str, str]
) -> tuple[str, ...]:
    """Return the command that connects to the SFTP server of a host.

    CASFS_SSH_COMMAND replaces `ssh` and its first arguments, as GIT_SSH_COMMAND does for git.
    """
    program = options.ssh_command
    if env.get("CASFS_SSH_COMMAND"):
        program = tuple(shlex.split(env["CASFS_SSH_COMMAND"]))
    command = [*program, "-x", "-a", "-oServerAliveInterval=15", "-oServerAliveCountMax=4"]
    if address.port is not None:
        command += ["-p", str(address.port)]
    if address.user is not None:
        command += ["-l", address.user]
    return (*command, "-s", "--", address.host, "sftp")
