"""Repositories by name, and which of several sources of a key is used."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from casfs.cli import app
from casfs.cli.commands.run import job_of
from casfs.cli.key_options import KeyOptions, PassphraseSource
from casfs.cli.param_types import RATE
from casfs.cli.settings import Settings
from casfs.config.repositories import NamedRepository
from casfs.config.values import AbsolutePath, Command, RepositoryUrl
from casfs.errors import ConfigError, UsageError
from casfs.repository.place import LocalPlace, RemotePlace
from casfs.storage.base import StorageOptions
from casfs.storage.counting import RequestKind

CONFIG = """\
[repositories.nas]
url = "/srv/casfs"
passphrase-file = "/etc/casfs/passphrase"
recipients-file = "/etc/casfs/recipients"
[repositories.plain]
url = "file:///srv/my%20backups"
[repositories.cloud]
url = "s3://bucket/prefix"
endpoint = "https://s3.example.org"
credentials-command = "pass show s3"
[profiles.home]
repository = "nas"
sources = ["/home"]
mirror-to = ["cloud"]
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    path.chmod(0o600)
    return str(path)


def settings(config: str, repo: str | None = None) -> Settings:
    return Settings(repo=repo, config=config)


def test_a_name_stands_for_its_path_and_its_keys(config: str) -> None:
    found = settings(config, "nas")
    assert found.repository() == LocalPlace(Path("/srv/casfs"))
    assert found.keys.passphrase.file == "/etc/casfs/passphrase"
    assert found.recipients_file() == Path("/etc/casfs/recipients")


def test_a_name_in_the_environment_is_address_too(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASFS_REPOSITORY", "nas")
    assert settings(config).repository() == LocalPlace(Path("/srv/casfs"))


@pytest.mark.parametrize("name", ["/srv/other", "./nas", "nas/", "other"])
def test_a_path_stays_a_path(config: str, name: str) -> None:
    found = settings(config, name)
    assert found.repository() == LocalPlace(Path(name).absolute())
    assert not found.keys.passphrase.is_given()
    assert found.recipients_file() is None


def test_a_file_url_is_a_path(config: str) -> None:
    assert settings(config, "plain").repository() == LocalPlace(Path("/srv/my backups"))


def test_an_address_says_how_its_place_is_reached(config: str) -> None:
    address = settings(config, "cloud").repository_address()
    assert address.url == "s3://bucket/prefix"
    options = address.storage_options()
    assert options.endpoint == "https://s3.example.org"
    assert options.credentials_command == "pass show s3"
    assert settings(config, "s3://bucket/prefix").repository_address().storage_options() == (
        StorageOptions()
    )


def test_a_remote_place_is_opened_with_the_options_of_the_configuration(config: str) -> None:
    place = settings(config, "cloud").repository()
    assert isinstance(place, RemotePlace)
    assert str(place) == "s3://bucket/prefix"
    assert place.options.endpoint == "https://s3.example.org"


def test_a_url_that_the_configuration_does_not_name_is_a_place(config: str) -> None:
    place = settings(config, "sftp://me@host/srv/r").repository()
    assert isinstance(place, RemotePlace)
    assert place.options.endpoint is None


def test_rate_limits_reach_the_storage_of_a_remote_place(config: str) -> None:
    found = settings(config, "cloud")
    found.upload_bytes_per_s = 1000
    place = found.repository()
    assert isinstance(place, RemotePlace)
    assert (place.options.upload_bytes_per_s, place.options.download_bytes_per_s) == (1000, None)
    assert place.options.endpoint == "https://s3.example.org"


def test_a_rate_limit_for_a_folder_is_refused(config: str) -> None:
    found = settings(config, "nas")
    found.download_bytes_per_s = 1000
    with pytest.raises(UsageError, match="/srv/casfs is a folder"):
        found.repository()


@pytest.mark.parametrize(
    ("text", "rate"), [("500K", 512_000), ("1", 1), ("2MiB/s", 2 << 20), ("1.5m", 3 << 19)]
)
def test_a_rate_is_in_bytes_per_second(text: str, rate: int) -> None:
    assert RATE.convert(text, None, None) == rate


@pytest.mark.parametrize("text", ["0", "fast", "-1", "10M/min", ""])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(click.UsageError, match="is not a rate"):
        RATE.convert(text, None, None)


def test_requests_to_a_remote_place_are_printed_as_json(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = settings(config, "cloud")
    found.as_json = True
    found.report_requests()
    place = found.repository()
    assert isinstance(place, RemotePlace)
    place.counter.add(RequestKind.READ, received_bytes=7)
    found.report_requests()
    assert json.loads(capsys.readouterr().out) == {
        "type": "requests",
        "read": {"requests": 1, "sent_bytes": 0, "received_bytes": 7},
    }


def test_no_repository_is_a_usage_error(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CASFS_REPOSITORY", raising=False)
    with pytest.raises(UsageError, match="no repository was named"):
        settings(config).repository()


def test_an_empty_repo_option_does_not_fall_back_to_the_environment(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASFS_REPOSITORY", "/srv/casfs")
    with pytest.raises(UsageError, match="--repo is empty"):
        settings(config, "").repository()


def named(**keys: AbsolutePath | Command) -> NamedRepository:
    return NamedRepository(url=RepositoryUrl("/srv/casfs"), **keys)  # type: ignore[arg-type]


class TestKeys:
    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CASFS_IDENTITY", "/from/environment")
        monkeypatch.setenv("CASFS_PASSPHRASE_FILE", "/secret/of/another")

    def test_the_environment_is_left_alone_where_the_configuration_names_a_key(self) -> None:
        keys = KeyOptions()
        keys.use_named(named(identity_file=AbsolutePath("/root/key")))
        found = keys.with_environment()
        assert (found.files, found.passphrase.is_given()) == (["/root/key"], False)
        keys = KeyOptions()
        keys.use_named(named(passphrase_command=Command("pass show x")))
        found = keys.with_environment()
        assert (found.files, found.passphrase.command) == ([], "pass show x")

    def test_an_option_goes_before_the_configuration(self) -> None:
        keys = KeyOptions(passphrase=PassphraseSource(fd=3))
        keys.use_named(named(identity_file=AbsolutePath("/root/key")))
        found = keys.with_environment()
        assert (found.files, found.passphrase.fd, found.passphrase.file) == ([], 3, None)

    def test_the_environment_is_used_where_nothing_else_is_said(self) -> None:
        keys = KeyOptions()
        keys.use_named(named())
        found = keys.with_environment()
        assert found.files == ["/from/environment"]
        assert found.passphrase.file == "/secret/of/another"


def test_a_profile_that_mirrors_is_refused_where_no_verb_can(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = settings(config)
    without = {name: place for name, place in app.VERBS.items() if name != "mirror"}
    monkeypatch.setattr(app, "VERBS", without)
    with pytest.raises(ConfigError, match=r":14: profiles\.home\.mirror-to: .* no verb mirror"):
        job_of(found, found.configuration(), "home")
    monkeypatch.setattr(app, "VERBS", without | {"mirror": "somewhere:mirror"})
    assert job_of(found, found.configuration(), "home").profile.mirror_to == ("cloud",)
