"""Credentials of roles, from servers of this test that answer as those of AWS do."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from casfs.errors import StorageDeniedError, StorageUnavailableError
from casfs.storage import aws_roles, aws_settings
from casfs.storage.aws_roles import role_credentials
from casfs.storage.aws_settings import Credentials
from casfs.storage.base import StorageOptions
from casfs.storage.s3_connection import Response, S3Connection

TOMORROW = (datetime.now(UTC) + timedelta(days=1)).replace(microsecond=0)
ANSWER = {
    "AccessKeyId": "role-id",
    "SecretAccessKey": "role-secret",
    "Token": "role-token",
    "Expiration": TOMORROW.isoformat().replace("+00:00", "Z"),
}
EXPECTED = Credentials("role-id", "role-secret", "role-token", TOMORROW)

STS = f"""<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><SessionToken>role-token</SessionToken>
<SecretAccessKey>role-secret</SecretAccessKey><Expiration>{ANSWER["Expiration"]}</Expiration>
<AccessKeyId>role-id</AccessKeyId></Credentials></AssumeRoleWithWebIdentityResult>
</AssumeRoleWithWebIdentityResponse>"""


@dataclass
class Asked:
    """A request as a server got it; names of headers are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: str


Answerer = Callable[[Asked], tuple[int, str]]


@dataclass
class RoleServer:
    """A server on this machine; `answer` returns the status and the body for each request."""

    url: str = ""
    answer: Answerer = lambda _: (404, "")
    asked: list[Asked] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[RoleServer]:
    found = RoleServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            asked = Asked(
                self.command,
                self.path,
                {name.lower(): value for name, value in self.headers.items()},
                body,
            )
            found.asked.append(asked)
            status, text = found.answer(asked)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_PUT = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{running.server_address[1]}"
    thread = threading.Thread(target=running.serve_forever, args=(0.05,))
    thread.start()
    yield found
    running.shutdown()
    running.server_close()
    thread.join()


def ask(env: Mapping[str, str]) -> Credentials:
    asks = role_credentials("eu-west-1", env)
    assert asks is not None
    return asks()


def test_a_container_shows_its_token_and_gets_credentials(
    server: RoleServer, tmp_path: Path
) -> None:
    server.answer = lambda _: (200, json.dumps(ANSWER))
    (tmp_path / "token").write_text("let me in\n")
    env = {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{server.url}/role",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(tmp_path / "token"),
    }
    assert ask(env) == EXPECTED
    assert (server.asked[0].path, server.asked[0].headers["authorization"]) == (
        "/role",
        "let me in",
    )


def test_the_server_of_a_container_is_known_by_its_address(
    server: RoleServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer = lambda _: (200, json.dumps(ANSWER))
    monkeypatch.setattr(aws_roles, "_CONTAINER", server.url)
    assert ask({"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/v2/credentials/1"}) == EXPECTED
    assert server.asked[0].path == "/v2/credentials/1"


@pytest.mark.parametrize("url", ["http://example.org/role", "ftp://127.0.0.1/x", "file:///etc/x"])
def test_the_token_of_a_container_goes_to_no_server_on_the_network(url: str) -> None:
    with pytest.raises(StorageDeniedError, match="no credentials are entrusted"):
        ask({"AWS_CONTAINER_CREDENTIALS_FULL_URI": url})


def test_an_instance_is_asked_with_a_token_of_its_session(
    server: RoleServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aws_roles, "is_on_ec2", lambda: True)

    def answer(asked: Asked) -> tuple[int, str]:
        if asked.path == "/latest/api/token":
            return (200, "session") if asked.method == "PUT" else (405, "")
        if asked.headers.get("x-aws-ec2-metadata-token") != "session":
            return 401, ""
        is_list = asked.path.endswith("/security-credentials/")
        return (200, "backup\n") if is_list else (200, json.dumps(ANSWER))

    server.answer = answer
    assert ask({"AWS_EC2_METADATA_SERVICE_ENDPOINT": server.url}) == EXPECTED
    assert server.asked[-1].path.endswith("/iam/security-credentials/backup")
    assert role_credentials("r", {"AWS_EC2_METADATA_DISABLED": "true"}) is None


def test_an_instance_without_a_role_gets_a_sentence(
    server: RoleServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aws_roles, "is_on_ec2", lambda: True)
    server.answer = lambda asked: (200, "session" if asked.method == "PUT" else "")
    with pytest.raises(StorageDeniedError, match="this EC2 instance has no role"):
        ask({"AWS_EC2_METADATA_SERVICE_ENDPOINT": server.url})


def test_a_pod_exchanges_its_token_for_credentials(server: RoleServer, tmp_path: Path) -> None:
    server.answer = lambda _: (200, STS)
    (tmp_path / "token").write_text("who I am")
    env = {
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
        "AWS_ROLE_ARN": "arn:aws:iam::1:role/backup",
        "AWS_ENDPOINT_URL_STS": server.url,
    }
    assert ask(env) == EXPECTED
    fields = parse_qs(server.asked[0].body)
    assert fields["WebIdentityToken"] == ["who I am"]
    assert fields["RoleArn"] == ["arn:aws:iam::1:role/backup"]
    (tmp_path / "token").unlink()
    with pytest.raises(StorageDeniedError, match="cannot be read"):
        ask(env)


@pytest.mark.parametrize(
    ("status", "body", "kind", "sentence"),
    [
        (403, "", StorageDeniedError, "check the role and its trust"),
        (302, "", StorageDeniedError, "the server answered 302"),
        (500, "", StorageUnavailableError, "the server answered 500"),
        (200, "{}", StorageDeniedError, "has no credentials"),
        (200, "nonsense", StorageDeniedError, "has no credentials"),
        (200, json.dumps({**ANSWER, "Expiration": "soon"}), StorageDeniedError, "no credentials"),
    ],
)
def test_a_server_that_gives_none_is_named_in_a_sentence(
    server: RoleServer, status: int, body: str, kind: type[Exception], sentence: str
) -> None:
    server.answer = lambda _: (status, body)
    with pytest.raises(kind, match=sentence):
        ask({"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{server.url}/role"})


def test_a_server_that_is_not_there_may_be_asked_again() -> None:
    with pytest.raises(StorageUnavailableError, match=r"cannot be asked for at 127.0.0.1:1\b"):
        ask({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:1/role"})


def test_requests_about_locks_are_signed_with_the_credentials_of_a_role(
    server: RoleServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    soon = (datetime.now(UTC) + timedelta(seconds=30)).isoformat()

    def answer(asked: Asked) -> tuple[int, str]:
        if asked.path == "/role":
            # The first credentials expire at once, so they are asked for again.
            first = len([one for one in server.asked if one.path == "/role"]) == 1
            return 200, json.dumps({**ANSWER, "Expiration": soon} if first else ANSWER)
        return 200, "<x/>"

    server.answer = answer
    for variable in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{server.url}/role")
    connection = S3Connection("bucket", StorageOptions(endpoint=server.url))
    try:
        for _ in range(3):
            assert isinstance(connection.request("GET", "", {"versioning": ""}), Response)
    finally:
        connection.close()
    paths = [one.path.partition("?")[0] for one in server.asked]
    assert paths == ["/role", "/bucket/", "/role", "/bucket/", "/bucket/"]
    signed = server.asked[1].headers
    assert "Credential=role-id/" in signed["authorization"]
    assert signed["x-amz-security-token"] == "role-token"


def test_the_token_of_a_session_in_the_variables_is_sent(
    server: RoleServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer = lambda _: (200, "<x/>")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of the session")
    connection = S3Connection("bucket", StorageOptions(endpoint=server.url))
    try:
        connection.request("GET", "", {"versioning": ""})
    finally:
        connection.close()
    assert server.asked[0].headers["x-amz-security-token"] == "of the session"
    assert aws_settings.aws_settings(StorageOptions()).credentials is not None
