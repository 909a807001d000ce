"""The names of places: what each means, and what is refused with the right form."""

from __future__ import annotations

import pytest

from casfs.errors import UsageError
from casfs.storage.base import StorageOptions
from casfs.storage.remote import ssh_command
from casfs.storage.url import Scheme, StorageAddress, parse_address


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("/srv/repository", StorageAddress(Scheme.FILE, "/srv/repository")),
        ("relative/a:b", StorageAddress(Scheme.FILE, "relative/a:b")),
        ("./user@host:path", StorageAddress(Scheme.FILE, "./user@host:path")),
        ("./s3:x", StorageAddress(Scheme.FILE, "./s3:x")),
        ("./s3://x", StorageAddress(Scheme.FILE, "./s3://x")),
        ("name", StorageAddress(Scheme.FILE, "name")),
        ("file:///srv/my%20files", StorageAddress(Scheme.FILE, "/srv/my files")),
        ("s3://bucket", StorageAddress(Scheme.S3, "", bucket="bucket")),
        ("s3://bucket/a/b/", StorageAddress(Scheme.S3, "a/b", bucket="bucket")),
        ("S3://my.bucket-1/x", StorageAddress(Scheme.S3, "x", bucket="my.bucket-1")),
        ("gs://bucket/x", StorageAddress(Scheme.GCS, "x", bucket="bucket")),
        ("az://container/x", StorageAddress(Scheme.AZURE, "x", bucket="container")),
        ("sftp://host/srv/r", StorageAddress(Scheme.SFTP, "/srv/r", host="host")),
        (
            "sftp://me@host:2222/srv/r/",
            StorageAddress(Scheme.SFTP, "/srv/r", "", "host", "me", 2222),
        ),
        ("sftp://me@[::1]:22/r", StorageAddress(Scheme.SFTP, "/r", "", "::1", "me", 22)),
        ("sftp://nas/~/casfs", StorageAddress(Scheme.SFTP, "casfs", host="nas")),
    ],
)
def test_a_name_means_its_place(name: str, address: StorageAddress) -> None:
    assert parse_address(name) == address


@pytest.mark.parametrize(
    "name",
    [
        "s3://bucket/a/b",
        "gs://bucket",
        "sftp://me@host:22/srv/a%20b",
        "sftp://h/~/x",
        "sftp://[::1]/r",
    ],
)
def test_a_location_is_written_as_it_is_read(name: str) -> None:
    assert str(parse_address(name)) == name


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("user@host:path", "sftp://user@host/~/path"),
        ("user@host:/srv/r", "sftp://user@host/srv/r"),
        ("host:/srv/r", "sftp://host/srv/r"),
        ("s3:foo/bar", "s3://BUCKET/PREFIX"),
        ("s3:https://host/bucket", "s3://BUCKET/PREFIX"),
        ("s3:/foo", "s3://BUCKET/PREFIX"),
        ("sftp:user@host:/x", "sftp://USER@HOST/PATH"),
        ("rclone:remote:path", "casfs does not use rclone"),
        ("b2:bucket:path", "s3://BUCKET/PREFIX, with AWS_ENDPOINT_URL"),
        ("b2://bucket/path", "s3://BUCKET/PREFIX, with AWS_ENDPOINT_URL"),
        ("swift:container:/path", "AWS_ENDPOINT_URL"),
        ("azure:container:/", "az://CONTAINER/PREFIX"),
        ("gs:bucket:/", "gs://BUCKET/PREFIX"),
        ("rest:http://host/", "s3://BUCKET/PREFIX or sftp"),
        ("ssh://user@host/path", "sftp://USER@HOST/PATH"),
        ("https://host/bucket", "AWS_ENDPOINT_URL"),
        ("smb://host/share", "mount the share"),
        ("file://host/path", "file:///PATH"),
        ("file:relative", "file:///PATH"),
        ("nonsense://x", "write a path, s3://"),
        ("", "empty"),
    ],
)
def test_names_of_other_programs_get_the_right_form(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(name)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "sftp://user:hunter2@host/path",
        "s3://AKIAKEY:hunter2@bucket/path",
        "s3://hunter2@bucket/path",
        "s3://bucket/path?secret=hunter2",
        "s3://bucket/path#hunter2",
    ],
)
def test_a_secret_in_a_name_is_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(name)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "sftp://-oProxyCommand=x/path",
        "sftp://-l@host/path",
        "sftp://ho st/path",
        "sftp:///path",
        "sftp://host",
        "sftp://host/",
        "sftp://host/~/",
        "sftp://host:notaport/x",
        "s3:///x",
        "s3://b",
        "s3://host:9000/bucket",
        "s3://bucket/a/../b",
        "s3://bucket//a",
        "s3://bucket/a%0Ab",
        "a\0b",
    ],
)
def test_addresses_that_could_mean_something_else_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        parse_address(name)


def test_ssh_is_asked_for_its_sftp_server_and_nothing_more() -> None:
    address = parse_address("sftp://me@host:2222/r")
    command = ssh_command(address, StorageOptions(), {})
    assert command[0] == "ssh"
    assert command[-8:] == ("-p", "2222", "-l", "me", "-s", "--", "host", "sftp")
    other = ssh_command(address, StorageOptions(), {"CASFS_SSH_COMMAND": "ssh -F 'my config'"})
    assert other[:3] == ("ssh", "-F", "my config")
