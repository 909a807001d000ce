"""Where S3 credentials come from, and what is said where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from casfs.errors import StorageDeniedError
from casfs.storage.aws_settings import Credentials, aws_settings, run_credentials_command
from casfs.storage.base import StorageOptions

CREDENTIALS = """
[default]
aws_access_key_id = default-id
aws_secret_access_key = default-secret
[backup]
aws_access_key_id = backup-id
aws_secret_access_key = backup%secret
aws_session_token = backup-token
[role]
aws_access_key_id = another-users-id
aws_secret_access_key = another-users-secret
"""
CONFIG = """
[default]
region = eu-central-1
[profile backup]
region = eu-west-3
endpoint_url = https://s3.example.org
[profile process]
credential_process = /bin/process
[profile sso]
sso_start_url = https://example.org
[profile role]
role_arn = arn:aws:iam::1:role/backup
source_profile = role
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / ".aws"
    folder.mkdir()
    (folder / "credentials").write_text(CREDENTIALS)
    (folder / "config").write_text(CONFIG)
    return {"HOME": str(tmp_path)}


def test_the_default_profile_is_read(env: dict[str, str]) -> None:
    settings = aws_settings(StorageOptions(), env)
    assert settings.credentials == Credentials("default-id", "default-secret")
    assert (settings.region, settings.endpoint) == ("eu-central-1", None)


def test_a_named_profile_gives_everything(env: dict[str, str]) -> None:
    for options, more in (
        (StorageOptions(profile="backup"), {}),
        (StorageOptions(), {"AWS_PROFILE": "backup"}),
    ):
        settings = aws_settings(options, env | more)
        assert settings.credentials == Credentials("backup-id", "backup%secret", "backup-token")
        assert (settings.region, settings.endpoint) == ("eu-west-3", "https://s3.example.org")


def test_variables_outrank_the_files_and_are_not_mixed_with_them(env: dict[str, str]) -> None:
    env |= {
        "AWS_PROFILE": "backup",
        "AWS_ACCESS_KEY_ID": "env-id",
        "AWS_SECRET_ACCESS_KEY": "env-secret",
        "AWS_REGION": "us-west-2",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
    }
    settings = aws_settings(StorageOptions(), env)
    assert settings.credentials == Credentials("env-id", "env-secret", None)
    assert (settings.region, settings.endpoint) == ("us-west-2", "http://127.0.0.1:1")


def test_the_configuration_outranks_the_variables(env: dict[str, str]) -> None:
    env |= {"AWS_ACCESS_KEY_ID": "env-id", "AWS_SECRET_ACCESS_KEY": "env-secret"}
    options = StorageOptions(
        access_key_id="own-id", secret_access_key="own-secret", region="r", endpoint="https://e"
    )
    settings = aws_settings(options, env)
    assert settings.credentials == Credentials("own-id", "own-secret")
    assert (settings.region, settings.endpoint) == ("r", "https://e")
    command = aws_settings(StorageOptions(credentials_command="print"), env)
    assert (command.command, command.credentials) == ("print", None)


def test_a_process_of_a_profile_is_a_command(env: dict[str, str]) -> None:
    assert aws_settings(StorageOptions(profile="process"), env).command == "/bin/process"


def test_files_elsewhere_are_found_by_their_variables(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("[default]\naws_access_key_id=a\naws_secret_access_key=b\n")
    env = {"HOME": "/nonexistent", "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "keys")}
    assert aws_settings(StorageOptions(), env).credentials == Credentials("a", "b")


@pytest.mark.parametrize(
    ("options", "more", "sentence"),
    [
        (
            StorageOptions(profile="sso"),
            {},
            "aws configure export-credentials --profile sso --format process.*`aws sso login",
        ),
        (
            StorageOptions(),
            {"AWS_PROFILE": "role"},
            "role uses role_arn, .*aws configure export-credentials --profile role",
        ),
        (StorageOptions(profile="missing"), {}, "there is no AWS profile 'missing'"),
        (
            StorageOptions(),
            {"HOME": "/nonexistent"},
            "there are no credentials for S3; set AWS_ACC",
        ),
    ],
)
def test_what_gives_no_credentials_says_what_to_do(
    env: dict[str, str], options: StorageOptions, more: dict[str, str], sentence: str
) -> None:
    with pytest.raises(StorageDeniedError, match=sentence):
        aws_settings(options, env | more)


def test_a_file_that_cannot_be_parsed_is_named(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".aws" / "credentials").write_text("nonsense\n")
    with pytest.raises(StorageDeniedError, match="credentials cannot be read"):
        aws_settings(StorageOptions(), env)


def test_a_command_may_print_lines_or_json() -> None:
    lines = "echo AWS_ACCESS_KEY_ID=a; echo export AWS_SECRET_ACCESS_KEY=\"'b'\""
    found = run_credentials_command(lines)
    assert (found.access_key_id, found.secret_access_key, found.session_token) == ("a", "b", None)
    json = """echo '{"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "b", "SessionToken": "c",
        "Expiration": "2030-01-01T00:00:00Z"}'"""
    found = run_credentials_command(json)
    assert (found.secret_access_key, found.session_token) == ("b", "c")
    assert found.expires_at is not None and found.expires_at.year == 2030


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("exit 3", "failed with exit code 3"),
        ("echo hello", "printed no credentials"),
        ("echo '{\"a\": 1}'", "printed no credentials"),
        ("printf '\\377'", "printed no credentials"),
    ],
)
def test_a_command_that_fails_says_so(command: str, sentence: str) -> None:
    with pytest.raises(StorageDeniedError, match=sentence):
        run_credentials_command(command)


def test_secrets_are_not_shown() -> None:
    assert "hidden" not in repr(Credentials("id", "hidden", "hidden"))
