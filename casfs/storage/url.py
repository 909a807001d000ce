"""The names of places: which storage a path or a URL means.

| name | place |
|---|---|
| a path, `file:///path` | a local or mounted folder |
| `s3://bucket/prefix` | S3, or a server with its protocol |
| `gs://bucket/prefix`, `az://container/prefix` | Google Cloud Storage, Azure |
| `sftp://user@host:port/path` | a machine that is reached by SSH; `/~/path` is below the home there |

A name that other programs would take for a remote place is never a local folder: it is refused with the right
form. A local path of such a shape is written with `./` before it. A name contains no secret.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import SplitResult, quote, unquote, urlsplit

from casfs.errors import UsageError


class Scheme(StrEnum):
    """The kinds of places."""

    FILE = "file"
    S3 = "s3"
    GCS = "gs"
    AZURE = "az"
    SFTP = "sftp"


@dataclass(frozen=True, slots=True)
class StorageAddress:
    """A place as it was named. `path` is a local path, a prefix in a bucket, or a path on a host."""

    scheme: Scheme
    path: str
    bucket: str = ""
    host: str = ""
    user: str | None = None
    port: int | None = None

    @property
    def is_local(self) -> bool:
        """Whether the place is a folder that this machine can open."""
        return self.scheme is Scheme.FILE

    def __str__(self) -> str:
        if self.is_local:
            return self.path
        if self.scheme is not Scheme.SFTP:
            return f"{self.scheme}://{self.bucket}/{quote(self.path)}".rstrip("/")
        user = f"{self.user}@" if self.user is not None else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port is not None else ""
        path = self.path if self.path.startswith("/") else f"/~/{self.path}"
        return f"sftp://{user}{host}{port}{quote(path)}"


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*|[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@\\-]*")

_ELSEWHERE = {
    "b2": "Backblaze B2 is reached by its S3 endpoint: s3://BUCKET/PREFIX, with AWS_ENDPOINT_URL set to it",
    "swift": "OpenStack Swift is reached by its S3 gateway: s3://BUCKET/PREFIX with AWS_ENDPOINT_URL",
    "rclone": "casfs does not use rclone; write s3://BUCKET/PREFIX, sftp://USER@HOST/PATH or a local path",
    "rest": "casfs has no REST server; write s3://BUCKET/PREFIX or sftp://USER@HOST/PATH",
    "http": "write s3://BUCKET/PREFIX, and set AWS_ENDPOINT_URL to the server",
    "https": "write s3://BUCKET/PREFIX, and set AWS_ENDPOINT_URL to the server",
    "ssh": "write sftp://USER@HOST/PATH",
    "scp": "write sftp://USER@HOST/PATH",
    "azure": "write az://CONTAINER/PREFIX",
    "azblob": "write az://CONTAINER/PREFIX",
    "abfs": "write az://CONTAINER/PREFIX",
    "gcs": "write gs://BUCKET/PREFIX",
    "smb": "mount the share, and write the path of the mounted folder",
    "cifs": "mount the share, and write the path of the mounted folder",
    "nfs": "mount it, and write the path of the mounted folder",
    "s3": "write s3://BUCKET/PREFIX; a server other than AWS is named by AWS_ENDPOINT_URL",
    "gs": "write gs://BUCKET/PREFIX",
    "az": "write az://CONTAINER/PREFIX",
    "sftp": "write sftp://USER@HOST/PATH",
    "file": "write file:///PATH or the path alone",
}


def parse_address(name: str) -> StorageAddress:
    """Return the place that a path or a URL names; raise UsageError, whose message shows the right form."""
    if not name:
        raise UsageError("the name of a repository is empty")
    if "\0" in name:
        raise UsageError("the name of a repository has a NUL byte")
    scheme = _SCHEME.match(name)
    if "://" not in name:
        return _parse_path(name, scheme[1].lower() if scheme else None)
    if scheme is None or scheme.end() != name.index("://") + 1:
        if "/" in name.partition("://")[0]:
            return StorageAddress(Scheme.FILE, name)  # such as ./s3://x
        hint = _ELSEWHERE.get(scheme[1].lower() if scheme is not None else "", _FORMS)
        raise UsageError(f"{_shown(name)} names no place that casfs knows; {hint}")
    kind = scheme[1].lower()
    if kind not in set(Scheme):
        hint = _ELSEWHERE.get(kind, _FORMS)
        raise UsageError(f"casfs knows no places that begin with {kind}://; {hint}")
    return _parse_url(Scheme(kind), name)


_FORMS = "write a path, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or sftp://USER@HOST/PATH"


def _parse_path(name: str, scheme: str | None) -> StorageAddress:
    first = name.partition("/")[0]
    if ":" not in first:
        return StorageAddress(Scheme.FILE, name)
    local = f"a local folder of this name is written ./{_shown(name)}"
    if scheme in _ELSEWHERE:
        raise UsageError(
            f"{_shown(name)} is no name of a repository: {_ELSEWHERE[scheme]}; {local}"
        )
    host, _, path = name.partition(":")
    form = (
        f"sftp://{host}/{path.lstrip('/')}" if path.startswith("/") else f"sftp://{host}/~/{path}"
    )
    raise UsageError(
        f"{_shown(name)} is no name of a repository: a folder on another machine is written "
        f"{_shown(form)}; {local}"
    )


def _parse_url(scheme: Scheme, name: str) -> StorageAddress:
    try:
        parts = urlsplit(name)
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise UsageError(f"{scheme}:// is followed by no valid address: {error}") from error
    if parts.password is not None:
        raise UsageError(
            "a password must not be in the name of a repository, where other users and logs see it; "
            + ("use a key and ssh-agent" if scheme is Scheme.SFTP else "set the usual variables")
        )
    if parts.query or parts.fragment or "?" in name or "#" in name:
        raise UsageError(
            "the name of a repository has no ? and no #; options belong in the configuration"
        )
    path = unquote(parts.path)
    if "\0" in path or "\n" in path or "\r" in path:
        raise UsageError("the name of a repository has a control character")
    if scheme is Scheme.FILE:
        if parts.netloc not in ("", "localhost") or not path.startswith("/"):
            raise UsageError(
                "a file:// URL has three slashes before an absolute path: file:///PATH"
            )
        return StorageAddress(scheme, path)
    if scheme is Scheme.SFTP:
        return _parse_sftp(parts, host, port, path)
    if parts.username is not None:
        raise UsageError("a key must not be in the name of a repository; set the usual variables")
    bucket = parts.netloc
    if port is not None or not _BUCKET.fullmatch(bucket):
        raise UsageError(
            f"{scheme}:// is followed by the name of a bucket, not by {_shown(bucket)!r}; the server is "
            "named by AWS_ENDPOINT_URL or `endpoint` in the configuration"
        )
    prefix = path.removeprefix("/").rstrip("/")
    if any(part in ("", ".", "..") for part in prefix.split("/")) and prefix:
        raise UsageError("the prefix in a bucket has no empty part, no . and no ..")
    return StorageAddress(scheme, prefix, bucket=bucket)


def _parse_sftp(
    parts: SplitResult, host: str | None, port: int | None, path: str
) -> StorageAddress:
    user = unquote(parts.username) if parts.username is not None else None
    # A host or a user that begins with a dash would be an option of ssh.
    if (
        host is None
        or not _HOST.fullmatch(host)
        or (user is not None and not _USER.fullmatch(user))
    ):
        raise UsageError("sftp:// is followed by a host, or USER@HOST: sftp://USER@HOST/PATH")
    path = path.rstrip("/")
    if path.startswith("/~/"):
        path = path[3:]
    if not path or path == "/~":
        raise UsageError("an sftp:// URL ends with the path of a folder: sftp://USER@HOST/PATH")
    return StorageAddress(Scheme.SFTP, path, host=host, user=user, port=port)


def _shown(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name)
