"""Where S3 credentials, region and endpoint come from: casfs's configuration, AWS's variables and files.

In this order, each as a whole: what the configuration says; a command of the configuration; the AWS_…
variables; the profile that is named, or `default`, in ~/.aws/credentials and ~/.aws/config; the role of a
container, a pod or an instance. `obstore` asks for a role by itself, and `aws_roles` does for the requests
that casfs signs.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from casfs.json_document import parse_json
from casfs.storage.base import StorageOptions
from casfs.storage.cloud_credentials import denied, parse_variables, run_command

DEFAULT_REGION = "us-east-1"

_COMMAND_VALID_FOR = timedelta(minutes=15)
_MAX_FILE_BYTES = 4 * 1024 * 1024

_RESOLVED_BY_AWS = ("role_arn", "sso_session", "sso_start_url", "login_session")
"""Keys of a profile for which AWS's own program asks a server or reads a cache."""

_TASK_ROLE_VARIABLES = (
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
)


@dataclass(frozen=True, slots=True)
class Credentials:
    """A key of S3; secrets do not appear in `repr`."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class AwsSettings:
    """The settings to reach a bucket. `command` prints new credentials when the current ones have expired."""

    region: str
    endpoint: str | None
    credentials: Credentials | None = None
    command: str | None = None


def aws_settings(options: StorageOptions, env: Mapping[str, str] | None = None) -> AwsSettings:
    """Return the settings from the configuration, the variables and the files.

    Raise StorageDeniedError if they contain no usable credentials. Runs no command.
    """
    env = env if env is not None else os.environ
    profile = _read_profile(options, env)
    region = (
        options.region
        or env.get("AWS_REGION")
        or env.get("AWS_DEFAULT_REGION")
        or profile.get("region")
        or DEFAULT_REGION
    )
    endpoint = (
        options.endpoint
        or env.get("AWS_ENDPOINT_URL_S3")
        or env.get("AWS_ENDPOINT_URL")
        or profile.get("endpoint_url")
    )
    settings = AwsSettings(region, endpoint)
    if options.access_key_id and options.secret_access_key:
        return replace(
            settings,
            credentials=Credentials(
                options.access_key_id, options.secret_access_key, options.session_token
            ),
        )
    if options.credentials_command:
        return replace(settings, command=options.credentials_command)
    if env.get("AWS_ACCESS_KEY_ID") and env.get("AWS_SECRET_ACCESS_KEY") and not options.profile:
        credentials = Credentials(
            env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"], env.get("AWS_SESSION_TOKEN")
        )
        return replace(settings, credentials=credentials)
    # Before the keys of the profile, as AWS's own programs do: with a role_arn they are another user's.
    for key in _RESOLVED_BY_AWS:
        if key in profile:
            raise denied("S3", _advice(key, options.profile or env.get("AWS_PROFILE")))
    if profile.get("aws_access_key_id") and profile.get("aws_secret_access_key"):
        credentials = Credentials(
            profile["aws_access_key_id"],
            profile["aws_secret_access_key"],
            profile.get("aws_session_token"),
        )
        return replace(settings, credentials=credentials)
    if profile.get("credential_process"):
        return replace(settings, command=profile["credential_process"])
    if any(env.get(name) for name in _TASK_ROLE_VARIABLES) or is_on_ec2():
        return settings
    raise denied(
        "S3",
        "there are no credentials for S3; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
        "or credentials-command in casfs's configuration",
    )


def _advice(key: str, profile: str | None) -> str:
    named = f" --profile {profile}" if profile else ""
    login = f" (after `aws sso login{named}`)" if key.startswith("sso") else ""
    command = f"aws configure export-credentials{named} --format process"
    return (
        f"the AWS profile {profile or 'default'} uses {key}, which casfs cannot resolve by itself; set "
        f'credentials-command = "{command}"{login} in casfs\'s configuration'
    )


def run_credentials_command(command: str) -> Credentials:
    """Return the credentials that a command prints; raise StorageDeniedError.

    It prints the JSON of AWS's credential_process, or lines NAME=VALUE with the names of the variables.
    """
    try:
        return _parse_credentials(run_command(command, "S3"))
    except (ValueError, KeyError, TypeError) as error:
        raise denied(
            "S3",
            "the credentials-command printed no credentials; it has to print AWS_ACCESS_KEY_ID=… and "
            "AWS_SECRET_ACCESS_KEY=… as lines, or the JSON of a credential_process",
        ) from error


def _parse_credentials(text: str) -> Credentials:
    if text.lstrip().startswith("{"):
        found = parse_json(text.encode(), dict[str, Any])
        expires = found.get("Expiration")
        return Credentials(
            str(found["AccessKeyId"]),
            str(found["SecretAccessKey"]),
            found.get("SessionToken"),
            datetime.fromisoformat(expires) if expires else _soon(),
        )
    values = parse_variables(text)
    return Credentials(
        values["AWS_ACCESS_KEY_ID"],
        values["AWS_SECRET_ACCESS_KEY"],
        values.get("AWS_SESSION_TOKEN"),
        _soon(),
    )


def _soon() -> datetime:
    return datetime.now(UTC) + _COMMAND_VALID_FOR


def _read_profile(options: StorageOptions, env: Mapping[str, str]) -> dict[str, str]:
    """Return the keys of a profile from both files; a profile that is named has to be there."""
    named = options.profile or env.get("AWS_PROFILE")
    name = named or "default"
    home = Path(env.get("HOME") or "~").expanduser()
    credentials_file = Path(env.get("AWS_SHARED_CREDENTIALS_FILE") or home / ".aws" / "credentials")
    config_file = Path(env.get("AWS_CONFIG_FILE") or home / ".aws" / "config")
    config_section = name if name == "default" else f"profile {name}"
    found = _section(config_file, config_section) | _section(credentials_file, name)
    if named and not found:
        raise denied(
            "S3",
            f"there is no AWS profile {name!r} in {credentials_file} or {config_file}; correct the name",
        )
    return found


def _section(path: Path, section: str) -> dict[str, str]:
    parser = configparser.RawConfigParser(default_section="\0none", strict=False)
    try:
        with path.open(encoding="utf-8") as file:
            parser.read_string(file.read(_MAX_FILE_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise denied(
            "S3", f"the file {path} cannot be read: {str(error).splitlines()[0]}"
        ) from error
    return dict(parser[section]) if parser.has_section(section) else {}


def is_on_ec2() -> bool:
    """Return whether this machine is an EC2 instance."""
    try:
        vendor = Path("/sys/class/dmi/id/sys_vendor").read_text()
    except OSError:
        return False
    return vendor.strip() == "Amazon EC2"
