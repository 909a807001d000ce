"""Credentials of the role of a container, a pod or an EC2 instance, for the requests that casfs signs itself.

`obstore` gets them by itself for the requests that it signs. They are valid for some hours at most, so
`expires_at` is always set. The servers are asked without a proxy, but for STS, which is on the internet.

https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html and
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-metadata-security-credentials.html
"""

from __future__ import annotations

import errno
import http.client
import ipaddress
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit
from xml.etree import ElementTree

from casfs.errors import StorageDeniedError, StorageUnavailableError
from casfs.json_document import parse_json
from casfs.storage.aws_settings import Credentials, is_on_ec2
from casfs.storage.cloud_credentials import denied

_TIMEOUT_S = 10
_MAX_BYTES = 64 * 1024
_CONTAINER = "http://169.254.170.2"
_CONTAINER_ADDRESSES = frozenset(["169.254.170.2", "169.254.170.23", "fd00:ec2::23"])
_INSTANCE = "http://169.254.169.254"
_ROLES = "/latest/meta-data/iam/security-credentials/"
_TOKEN_S = "21600"


def role_credentials(region: str, env: Mapping[str, str]) -> Callable[[], Credentials] | None:
    """Return what asks for the credentials of the role of this machine, None where it has none.

    It raises StorageDeniedError for a role that gives none, and StorageUnavailableError where the server that
    gives them does not answer.
    """
    if env.get("AWS_WEB_IDENTITY_TOKEN_FILE") and env.get("AWS_ROLE_ARN"):
        return lambda: _ask_sts(region, env)
    if env.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"):
        url = _CONTAINER + env["AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"]
        return lambda: _ask_container(url, env)
    if env.get("AWS_CONTAINER_CREDENTIALS_FULL_URI"):
        url = env["AWS_CONTAINER_CREDENTIALS_FULL_URI"]
        return lambda: _ask_container(url, env)
    if is_on_ec2() and env.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true":
        return lambda: _ask_instance(env)
    return None


def _ask_container(url: str, env: Mapping[str, str]) -> Credentials:
    if not _is_near(url):
        raise denied(
            "S3",
            f"AWS_CONTAINER_CREDENTIALS_FULL_URI is {url!r}, to which no credentials are entrusted: it has "
            "to begin with https:// or to name this machine",
        )
    headers = {}
    token = env.get("AWS_CONTAINER_AUTHORIZATION_TOKEN")
    if env.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"):
        token = _read_token(env["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"])
    if token:
        headers["Authorization"] = token
    return _parse_json_answer(_ask("the container's role", url, headers))


def _is_near(url: str) -> bool:
    """Return whether a URL is encrypted, or of this machine or its host."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "https":
        return True
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    return parts.scheme == "http" and (is_local or host in _CONTAINER_ADDRESSES)


def _ask_instance(env: Mapping[str, str]) -> Credentials:
    server = env.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", _INSTANCE).rstrip("/")
    what = "the instance's role"
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": _TOKEN_S}
    token = _ask(what, f"{server}/latest/api/token", ttl, method="PUT").decode("ascii", "replace")
    headers = {"X-aws-ec2-metadata-token": token}
    roles = _ask(what, server + _ROLES, headers).decode("utf-8", "replace").split()
    if not roles:
        raise denied("S3", "this EC2 instance has no role; give it one, or set AWS_ACCESS_KEY_ID")
    return _parse_json_answer(_ask(what, f"{server}{_ROLES}{roles[0]}", headers))


def _parse_json_answer(data: bytes) -> Credentials:
    try:
        found = parse_json(data, dict[str, Any])
        return Credentials(
            str(found["AccessKeyId"]),
            str(found["SecretAccessKey"]),
            str(found["Token"]),
            datetime.fromisoformat(found["Expiration"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise denied("S3", "the answer for the role of this machine has no credentials") from error


def _ask_sts(region: str, env: Mapping[str, str]) -> Credentials:
    server = env.get("AWS_ENDPOINT_URL_STS") or f"https://sts.{region}.amazonaws.com"
    fields = {
        "Action": "AssumeRoleWithWebIdentity",
        "Version": "2011-06-15",
        "RoleArn": env["AWS_ROLE_ARN"],
        "RoleSessionName": env.get("AWS_ROLE_SESSION_NAME") or f"casfs-{os.getpid()}",
        "WebIdentityToken": _read_token(env["AWS_WEB_IDENTITY_TOKEN_FILE"]),
    }
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    body = urlencode(fields).encode()
    answer = _ask("STS", f"{server.rstrip('/')}/", headers, "POST", body, uses_proxy=True)
    try:
        root = ElementTree.fromstring(answer)
        found = {node.tag.rpartition("}")[2]: (node.text or "").strip() for node in root.iter()}
        return Credentials(
            found["AccessKeyId"],
            found["SecretAccessKey"],
            found["SessionToken"],
            datetime.fromisoformat(found["Expiration"]),
        )
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise denied("S3", "the answer of STS has no credentials") from error


def _read_token(name: str) -> str:
    try:
        with Path(name).open("rb") as file:
            return file.read(_MAX_BYTES).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise denied("S3", f"the token in {name} cannot be read") from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """Follow no server to another one."""


def _ask(
    what: str,
    url: str,
    headers: Mapping[str, str],
    method: str = "GET",
    body: bytes | None = None,
    uses_proxy: bool = False,
) -> bytes:
    """Return the answer of a server; raise StorageDeniedError where it refuses."""
    proxies = urllib.request.ProxyHandler(None if uses_proxy else {})
    opener = urllib.request.build_opener(proxies, _NoRedirect)
    try:
        request = urllib.request.Request(url, data=body, headers=dict(headers), method=method)
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            data: bytes = answer.read(_MAX_BYTES)
            return data
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(what, error.code) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = f"{what} cannot be asked for at {urlsplit(url).netloc}: {error}"
        raise StorageUnavailableError("use", "S3", OSError(errno.EAGAIN, reason)) from error


def _refusal(what: str, status: int) -> StorageDeniedError | StorageUnavailableError:
    if status == 429 or status >= 500:
        reason = OSError(errno.EAGAIN, f"the server answered {status} for {what}")
        return StorageUnavailableError("use", "S3", reason)
    return denied(
        "S3",
        f"{what} gives no credentials (the server answered {status}); check the role and its trust",
    )
