"""Servers that the tests of storages share: each is started once for a process that runs tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.servers import S3Server, SshServer, seaweedfs, sshd


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with seaweedfs() as server:
        server.make_bucket("casfs")
        yield server


@pytest.fixture(scope="session")
def ssh_server() -> Iterator[SshServer]:
    with sshd() as server:
        yield server
