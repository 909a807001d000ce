"""Signed requests to an S3 bucket over `http.client`: what `obstore` has no call for.

`obstore` transfers objects; it cannot ask for versions and locks. boto3 could, in 15 MB of code of which
casfs would need five requests. Credentials, endpoint, certificates and proxies come from the same sources as
obstore's. Threads may send requests at the same time; idle connections are kept for the next request.
"""

from __future__ import annotations

import errno
import http.client
import os
import ssl
import threading
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from casfs import __version__
from casfs.errors import StorageDeniedError, StorageError, StorageUnavailableError
from casfs.storage.aws_settings import (
    AwsSettings,
    Credentials,
    aws_settings,
    run_credentials_command,
)
from casfs.storage.base import StorageOptions
from casfs.storage.cloud_credentials import denied
from casfs.storage.object_store_errors import Answer, error_of_answer, parse_body
from casfs.storage.s3_signature import encoded_path, encoded_query, signed_headers

_TIMEOUT_S = 60
_RENEWED_BEFORE = timedelta(minutes=1)
_MAX_ERROR_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Response:
    """A successful answer. Names of headers are in lower case."""

    headers: Mapping[str, str]
    body: bytes


class S3Connection:
    """Sends requests to one bucket; raise StorageDeniedError where there are no credentials."""

    def __init__(self, bucket: str, options: StorageOptions) -> None:
        self._settings = aws_settings(options)
        self._renew = _renewal(self._settings)
        self._url, self._base_path = _address(bucket, options, self._settings)
        self._tls = _tls_context(options) if self._url.scheme == "https" else None
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._credentials = self._settings.credentials

    def request(
        self,
        method: str,
        key: str,
        query: Mapping[str, str],
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        max_bytes: int = 1024 * 1024,
    ) -> Response | Answer:
        """Send a request for an object, or for the bucket where `key` is empty, and return the answer.

        An `Answer` is one that the server refused with. Raise StorageUnavailableError for a connection that
        fails, and StorageError for a body of more than `max_bytes`.
        """
        path = encoded_path(f"{self._base_path}/{key}")
        text = encoded_query(query)
        sent = signed_headers(
            method,
            path,
            text,
            {"host": self._url.netloc, **(headers or {})},
            body,
            self._current_credentials(),
            self._settings.region,
        )
        sent["user-agent"] = f"casfs/{__version__}"
        where = f"{self._url.geturl()}{path}"
        connection = self._take()
        try:
            connection.request(
                method,
                f"{self._proxied_prefix()}{path}?{text}",
                body,
                sent | self._proxy_headers(),
            )
            response = connection.getresponse()
            if response.status >= 300:
                max_bytes = _MAX_ERROR_BYTES
            data = response.read(max_bytes + 1)
        except ssl.SSLCertVerificationError as error:
            connection.close()
            reason = (
                "the server's certificate is not trusted; set `ca-file` in casfs's configuration to the file "
                "of the authority that signed it"
            )
            raise StorageError("use", where, OSError(errno.EIO, reason)) from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            reason = str(error) or type(error).__name__
            raise StorageUnavailableError(
                "use", where, OSError(errno.EAGAIN, f"the connection failed: {reason}")
            ) from error
        except BaseException:
            connection.close()
            raise
        if len(data) > max_bytes:
            connection.close()
            raise StorageError("read", where, OSError(errno.EFBIG, "the answer is too long"))
        self._give_back(connection)
        if response.status >= 300:
            return parse_body(response.status, data)
        return Response({name.lower(): value for name, value in response.getheaders()}, data)

    def require(
        self,
        method: str,
        key: str,
        query: Mapping[str, str],
        action: str,
        place: str,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        max_bytes: int = 1024 * 1024,
    ) -> Response:
        """Send a request and return its successful answer; raise the error of any other.

        `action` and `place` are for its message.
        """
        answer = self.request(method, key, query, headers, body, max_bytes)
        if isinstance(answer, Answer):
            raise error_of_answer(answer, action, place)
        return answer

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _current_credentials(self) -> Credentials:
        with self._lock:
            known = self._credentials
            expires = known.expires_at if known is not None else None
            if expires is not None and expires.tzinfo is None:
                expires = expires.replace(tzinfo=UTC)
            if known is not None and (
                expires is None or datetime.now(UTC) < expires - _RENEWED_BEFORE
            ):
                return known
            self._credentials = self._renew()
            return self._credentials

    def _take(self) -> http.client.HTTPConnection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        host, port = self._url.hostname or "", self._url.port
        proxy = self._proxy()
        if self._tls is None:
            if proxy is not None:
                return http.client.HTTPConnection(
                    proxy.hostname or "", proxy.port, timeout=_TIMEOUT_S
                )
            return http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
        if proxy is None:
            return http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=self._tls)
        connection = http.client.HTTPSConnection(
            proxy.hostname or "", proxy.port, timeout=_TIMEOUT_S, context=self._tls
        )
        connection.set_tunnel(host, port, _proxy_authorization(proxy))
        return connection

    def _give_back(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._idle.append(connection)

    def _proxy(self) -> SplitResult | None:
        host = self._url.hostname or ""
        name = getproxies().get(self._url.scheme)
        if not name or proxy_bypass(host):
            return None
        return urlsplit(name if "://" in name else f"http://{name}")

    def _proxied_prefix(self) -> str:
        """Return the prefix of the path in a request to a proxy that is no tunnel, else ""."""
        is_plain = self._tls is None and self._proxy() is not None
        return f"http://{self._url.netloc}" if is_plain else ""

    def _proxy_headers(self) -> dict[str, str]:
        proxy = self._proxy() if self._tls is None else None
        return _proxy_authorization(proxy) if proxy is not None else {}


def _renewal(settings: AwsSettings) -> Callable[[], Credentials]:
    """Return what gets credentials that are valid for some time, where they are not fixed."""
    command, fixed = settings.command, settings.credentials
    if fixed is not None:
        return lambda: fixed
    if command is not None:
        return lambda: run_credentials_command(command)
    from casfs.storage.aws_roles import role_credentials

    asks = role_credentials(settings.region, os.environ)
    if asks is None:
        raise denied(
            "S3",
            "locks and versions of objects need credentials that casfs can read; set credentials-command = "
            '"aws configure export-credentials --format process" in casfs\'s configuration',
        )
    return asks


def _proxy_authorization(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(user.encode()).decode()}"}


def _address(
    bucket: str, options: StorageOptions, settings: AwsSettings
) -> tuple[SplitResult, str]:
    """Return the server's URL and the path before the names of objects there."""
    if settings.endpoint is None:
        return urlsplit(f"https://{bucket}.s3.{settings.region}.amazonaws.com"), ""
    url = urlsplit(settings.endpoint.rstrip("/"))
    if not options.virtual_hosted:
        return url, f"{url.path}/{bucket}"
    if not url.netloc.startswith(f"{bucket}."):
        url = url._replace(netloc=f"{bucket}.{url.netloc}")
    return url, url.path


def _tls_context(options: StorageOptions) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise StorageDeniedError(
            "read", options.ca_file or "the certificates", OSError(errno.EIO, str(error))
        ) from error
    with suppress(NotImplementedError):
        context.set_alpn_protocols(["http/1.1"])
    return context
