"""AWS's signature version 4 of a request without a body that is streamed.

https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import quote

from casfs.storage.aws_settings import Credentials

_ALGORITHM = "AWS4-HMAC-SHA256"


def encoded_path(path: str) -> str:
    """Return a path as S3 signs and sends it."""
    return quote(path, safe="/-_.~")


def encoded_query(query: Mapping[str, str]) -> str:
    """Return a query as S3 signs and sends it: sorted, and with `=` after a name without a value."""
    return "&".join(
        sorted(
            f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}"
            for name, value in query.items()
        )
    )


def signed_headers(
    method: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    body: bytes,
    credentials: Credentials,
    region: str,
    now: datetime | None = None,
) -> dict[str, str]:
    """Return the headers to send: the given ones, which contain `host`, and those of the signature.

    `path` and `query` are encoded. Every header is signed.
    """
    time = (now if now is not None else datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
    body_digest = hashlib.sha256(body).hexdigest()
    signed = {name.lower(): " ".join(value.split()) for name, value in headers.items()}
    signed |= {"x-amz-content-sha256": body_digest, "x-amz-date": time}
    if credentials.session_token is not None:
        signed["x-amz-security-token"] = credentials.session_token
    names = ";".join(sorted(signed))
    lines = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed))
    request = "\n".join([method, path, query, lines, names, body_digest])
    scope = f"{time[:8]}/{region}/s3/aws4_request"
    to_sign = "\n".join([_ALGORITHM, time, scope, hashlib.sha256(request.encode()).hexdigest()])
    key = f"AWS4{credentials.secret_access_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    signed["authorization"] = (
        f"{_ALGORITHM} Credential={credentials.access_key_id}/{scope},"
        f"SignedHeaders={names},Signature={signature}"
    )
    return signed
