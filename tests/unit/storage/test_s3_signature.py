"""The signature of S3 requests: the examples that AWS publishes."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from casfs.storage.aws_settings import Credentials
from casfs.storage.s3_signature import encoded_path, encoded_query, signed_headers

CREDENTIALS = Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
NOW = datetime(2013, 5, 24, tzinfo=UTC)
HOST = {"host": "examplebucket.s3.amazonaws.com"}


# https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html, "Examples".
@pytest.mark.parametrize(
    ("method", "path", "query", "headers", "body", "signature"),
    [
        (
            "GET",
            "/test.txt",
            {},
            {"Range": "bytes=0-9"},
            b"",
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
        ),
        (
            "PUT",
            "/test$file.text",
            {},
            {"date": "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class": "REDUCED_REDUNDANCY"},
            b"Welcome to Amazon S3.",
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
        ),
        (
            "GET",
            "/",
            {"lifecycle": ""},
            {},
            b"",
            "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
        ),
        (
            "GET",
            "/",
            {"prefix": "J", "max-keys": "2"},
            {},
            b"",
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
        ),
    ],
)
def test_published_examples_have_their_signature(
    method: str,
    path: str,
    query: dict[str, str],
    headers: dict[str, str],
    body: bytes,
    signature: str,
) -> None:
    signed = signed_headers(
        method,
        encoded_path(path),
        encoded_query(query),
        HOST | headers,
        body,
        CREDENTIALS,
        "us-east-1",
        NOW,
    )
    assert signed["authorization"].endswith(f",Signature={signature}")
    assert (
        "Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,"
        in (signed["authorization"])
    )


def test_a_session_token_is_signed_and_sent() -> None:
    credentials = Credentials("id", "secret", "token")
    signed = signed_headers("GET", "/", "", HOST, b"", credentials, "eu-west-1", NOW)
    assert signed["x-amz-security-token"] == "token"
    assert "x-amz-security-token" in signed["authorization"]


def test_names_and_values_are_encoded_as_s3_expects() -> None:
    assert encoded_path("/bucket/a b/ü+~.x") == "/bucket/a%20b/%C3%BC%2B~.x"
    assert encoded_query({"versionId": "a/b=", "prefix": "r/p", "x": ""}) == (
        "prefix=r%2Fp&versionId=a%2Fb%3D&x="
    )
