"""Configuration files: what is read, and what is said of one that is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from casfs.config import file as config_file
from casfs.config.file import Configuration, load_configuration
from casfs.config.profiles import Profile, Schedule
from casfs.errors import ConfigError, NotFoundError, UsageError

COMPLETE = """\
[repositories.nas]
url = "sftp://backup@nas/volume1/casfs"
identity-file = "/root/casfs.age"

[repositories.cloud]
url = "s3://my-bucket/casfs"
endpoint = "https://s3.example.org"
credentials-command = "pass show casfs/s3"

[profiles.home]
repository = "nas"
sources = ["/home", "/etc"]
exclude = ["*.tmp", "/home/*/.cache/"]
exclude-caches = true
tags = ["home"]
keep = { daily = 7, weekly = 5, monthly = "unlimited" }
check = { older-than = "30d", max-duration = "20m", every = "1d" }
prune-every = "7d"
mirror-to = ["cloud"]
schedule = "daily"
metrics-file = "/var/lib/node_exporter/casfs-home.prom"
ping = "https://hc.example.org/uuid"
hooks = { before = "a", after = "b", failure = "c", finally = "d" }
"""

SMALL = """\
[repositories.nas]
url = "/srv/casfs"
[profiles.home]
repository = "nas"
sources = ["/home"]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def read(path: Path, text: str) -> Configuration:
    path.write_text(text)
    path.chmod(0o600)
    return load_configuration(str(path))


def error_in(path: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read(path, text)
    assert caught.value.file == str(path)
    assert str(caught.value).startswith(f"{path}:")
    return caught.value


def test_a_complete_file_is_read_as_it_is_documented(path: Path) -> None:
    configuration = read(path, COMPLETE)
    profile = configuration.profile("home")
    assert [source.path for source in profile.sources] == ["/home", "/etc"]
    assert profile.keep is not None
    assert (profile.keep.daily, profile.keep.monthly, profile.keep.yearly) == (7, "unlimited", None)
    assert profile.check is not None and profile.check.every is not None
    assert profile.check.every.seconds == 86_400
    assert profile.prune_every is not None and profile.prune_every.seconds == 7 * 86_400
    assert profile.hooks.finally_ is not None and profile.hooks.finally_.text == "d"
    assert profile.timetable() == Schedule(calendar="daily")
    cloud = configuration.repository("cloud")
    assert cloud.url.url == "s3://my-bucket/casfs"
    assert cloud.credentials_command is not None
    assert configuration.file_of("profiles", "home").lines["profiles", "home", "tags"] == 15


def test_a_schedule_may_be_a_table(path: Path) -> None:
    text = SMALL + 'schedule = { calendar = "Mon 03:00", random-delay = "1h", on-battery = true }\n'
    timetable = read(path, text).profile("home").timetable()
    assert timetable is not None and timetable.random_delay is not None
    assert (timetable.calendar, timetable.on_battery) == ("Mon 03:00", True)
    assert timetable.random_delay.seconds == 3600


def test_a_leading_tilde_is_the_home_of_the_user(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    configuration = read(path, SMALL.replace("/srv/casfs", "~/casfs").replace("/home", "~"))
    assert configuration.repository("nas").url.url == "/home/anna/casfs"
    assert configuration.profile("home").sources[0].path == "/home/anna"


WRONG = {
    "unknown key": ("exclude-cache = true", "profiles.home.exclude-cache", "exclude-caches?"),
    "unknown key far from any": ("zzz = true", "profiles.home.zzz", "there are: repository"),
    "unknown key of a table": ('check = { evry = "1d" }', "profiles.home.check.evry", "every?"),
    "number for a string": ("host = 1", "profiles.home.host", "a string, not an integer"),
    "string for a flag": ('reread = "yes"', "profiles.home.reread", "true or false, not a string"),
    "string for an array": ('tags = "home"', "profiles.home.tags", "an array, not a string"),
    "number in an array": ('tags = ["a", 2]', "profiles.home.tags[1]", "a string, not an integer"),
    "flag for a table": ("check = true", "profiles.home.check", "a table, not true or false"),
    "date for a string": ("host = 2020-01-01", "profiles.home.host", "a string, not a date"),
    "schedule of a wrong type": ("schedule = 1", "profiles.home.schedule", "a string or a table"),
    "empty schedule": ('schedule = ""', "profiles.home.schedule", "must not be empty"),
    "no duration": ('prune-every = "often"', "profiles.home.prune-every", "30d, 12h or 10m"),
    "no calendar span": ('keep = { within = "x" }', "profiles.home.keep.within", "1y6m or 30d"),
    "no size": ('exclude-larger-than = "big"', "profiles.home.exclude-larger-than", "not a size"),
    "no share": (
        'check = { read-data-subset = "0%" }',
        "profiles.home.check.read-data-subset",
        "above 0%",
    ),
    "count of zero": ("keep = { daily = 0 }", "profiles.home.keep.daily", "at least 1"),
    "count in words": ('keep = { daily = "x" }', "profiles.home.keep.daily", "a number, unlimited"),
    "nothing to keep": ("keep = {}", "profiles.home.keep", "nothing to keep"),
    "level": ("compression = 99", "profiles.home.compression", "at most 22"),
    "choice": ('freeze = "x"', "profiles.home.freeze", "auto, never, require"),
    "tag with a comma": ('tags = ["a,b"]', "profiles.home.tags[0]", "comma"),
    "empty tag": ('tags = [""]', "profiles.home.tags[0]", "not empty"),
    "NUL": ('metrics-file = "/a\\u0000"', "profiles.home.metrics-file", "NUL"),
    "relative path": ('metrics-file = "a/b"', "profiles.home.metrics-file", "absolute path"),
    "ping without a host": ('ping = "hc.example"', "profiles.home.ping", "http"),
    "ping with a password": ('ping = "https://a:b@c/"', "profiles.home.ping", "password"),
    "ping with a space": ('ping = "https://c/ x"', "profiles.home.ping", "spaces"),
    "ping with a wrong port": ('ping = "https://c:x/"', "profiles.home.ping", "not a URL"),
    "unknown mirror": ('mirror-to = ["x"]', "profiles.home.mirror-to[0]", "[repositories.x]"),
    "mirror to itself": ('mirror-to = ["nas"]', "profiles.home.mirror-to[0]", "own repository"),
    "hook of a wrong type": (
        "hooks = { finally = 1 }",
        "profiles.home.hooks.finally",
        "a string, not an integer",
    ),
    "unknown hook": ('hooks = { befor = "x" }', "profiles.home.hooks.befor", "before?"),
    "notify without a command": (
        'notify = { on = "always" }',
        "profiles.home.notify.command",
        "missing",
    ),
    "notify at a wrong time": (
        'notify = { command = "x", on = "never" }',
        "profiles.home.notify.on",
        "always, failure, problems",
    ),
}


@pytest.mark.parametrize(("line", "key", "reason"), WRONG.values(), ids=WRONG)
def test_a_wrong_value_is_refused_with_file_line_and_key(
    path: Path, line: str, key: str, reason: str
) -> None:
    error = error_in(path, f"{SMALL}\n{line}\n")
    assert (error.line, error.key) == (7, key)
    assert reason in str(error)
    assert "\n" not in str(error)


def test_an_error_inside_an_array_names_the_line_of_the_item(path: Path) -> None:
    error = error_in(path, SMALL + 'tags = [\n  "a",\n  3,\n]\n')
    assert (error.line, error.key) == (8, "profiles.home.tags[1]")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("relative/path", "absolute path"),
        ("ftp://host/path", "ftp:// is not a kind of repository"),
        ("sftp://user:secret@host/path", "must not hold a password"),
        ("", "not empty"),
    ],
)
def test_a_repository_that_cannot_be_meant_is_refused(path: Path, url: str, reason: str) -> None:
    error = error_in(path, SMALL.replace("/srv/casfs", url))
    assert (error.line, error.key) == (2, "repositories.nas.url")
    assert reason in str(error)
    assert "secret" not in str(error)


def test_a_profile_of_a_repository_that_is_not_configured_is_refused(path: Path) -> None:
    error = error_in(path, SMALL.replace('repository = "nas"', 'repository = "cloud"'))
    assert (error.line, error.key) == (4, "profiles.home.repository")
    assert "there are: nas" in str(error)


def test_a_missing_key_is_reported_at_its_table(path: Path) -> None:
    error = error_in(path, SMALL.replace('repository = "nas"\n', ""))
    assert (error.line, error.key) == (3, "profiles.home.repository")
    assert "is missing" in str(error)


def test_a_profile_without_sources_is_refused(path: Path) -> None:
    error = error_in(path, SMALL.replace('["/home"]', "[]"))
    assert (error.line, error.key) == (5, "profiles.home.sources")


def test_two_sources_of_a_passphrase_are_refused(path: Path) -> None:
    text = SMALL.replace("[profiles", 'passphrase-file = "/a"\npassphrase-command = "b"\n[profiles')
    error = error_in(path, text)
    assert (error.line, error.key) == (1, "repositories.nas")
    assert "not both" in str(error)


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("[profile.home]\n", 1, "profile"),
        ("\nprofiles = 1\n", 2, "profiles"),
        ("[profiles]\nhome = 1\n", 2, "profiles.home"),
        ('[profiles."a b"]\n', 1, "profiles.a b"),
        ('[profiles."../x"]\n', 1, "profiles.../x"),
        ("x = \n", 1, ""),
        ("[a]\n\nb = [1,\n", 4, ""),
        ("x = " + "[" * 5000, None, ""),
    ],
)
def test_a_file_of_a_wrong_shape_is_refused(
    path: Path, text: str, line: int | None, key: str
) -> None:
    error = error_in(path, text)
    assert (error.line, error.key) == (line, key)


def test_bytes_that_are_not_utf8_are_refused_with_their_line(path: Path) -> None:
    path.write_bytes(b"# a\n# \xff\n")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=":2: is not UTF-8"):
        load_configuration(str(path))


def test_lines_are_counted_in_a_file_with_carriage_returns(path: Path) -> None:
    path.write_bytes((SMALL + "zzz = 1\n").replace("\n", "\r\n").encode())
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r":6: profiles\.home\.zzz"):
        load_configuration(str(path))


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(path: Path, mode: int) -> None:
    path.write_text(SMALL)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="can be written by other users"):
        load_configuration(str(path))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it gives a file away")
def test_a_file_of_another_user_is_refused(path: Path) -> None:
    path.write_text(SMALL)
    path.chmod(0o600)
    os.chown(path, 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to another user"):
        load_configuration(str(path))


def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(path: Path) -> None:
    os.mkfifo(path, 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        load_configuration(str(path))


def test_a_file_larger_than_a_configuration_can_be_is_refused(path: Path) -> None:
    error = error_in(path, "#" * (1024 * 1024 + 1))
    assert "larger" in str(error)


def test_a_configuration_error_is_a_usage_error(path: Path) -> None:
    assert isinstance(error_in(path, "x = 1\n"), UsageError)


class TestLookup:
    @pytest.fixture(autouse=True)
    def places(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "own"))
        monkeypatch.setattr(config_file, "SYSTEM_FILE", tmp_path / "etc" / "config.toml")
        monkeypatch.delenv("CASFS_CONFIG", raising=False)

    def write(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o600)
        return path

    def test_without_any_file_nothing_is_configured(self, tmp_path: Path) -> None:
        configuration = load_configuration()
        assert (dict(configuration.profiles), dict(configuration.repositories)) == ({}, {})
        with pytest.raises(NotFoundError, match=r"no configuration file exists; write .*own"):
            configuration.profile("home")

    def test_the_table_of_the_user_replaces_that_of_the_machine(self, tmp_path: Path) -> None:
        system = self.write(
            tmp_path / "etc" / "config.toml",
            SMALL + 'host = "machine"\n[profiles.etc]\nrepository = "nas"\nsources = ["/etc"]\n',
        )
        own = self.write(
            tmp_path / "own" / "casfs" / "config.toml",
            '[profiles.home]\nrepository = "nas"\nsources = ["/mine"]\n',
        )
        configuration = load_configuration()
        home: Profile = configuration.profile("home")
        assert (home.sources[0].path, home.host) == ("/mine", None)
        assert configuration.file_of("profiles", "home").path == own
        assert configuration.file_of("profiles", "etc").path == system
        with pytest.raises(NotFoundError, match=r"no profile 'hom' in .*; there are: etc, home"):
            configuration.profile("hom")

    def test_an_environment_variable_names_the_only_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.write(tmp_path / "own" / "casfs" / "config.toml", SMALL)
        other = self.write(tmp_path / "other.toml", SMALL.replace("home]", "other]"))
        monkeypatch.setenv("CASFS_CONFIG", str(other))
        assert set(load_configuration().profiles) == {"other"}

    def test_a_file_that_is_named_goes_before_the_environment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        named = self.write(tmp_path / "named.toml", SMALL)
        monkeypatch.setenv("CASFS_CONFIG", str(tmp_path / "missing.toml"))
        assert set(load_configuration(str(named)).profiles) == {"home"}
        with pytest.raises(NotFoundError, match=r"missing\.toml does not exist"):
            load_configuration()


def test_a_folder_in_place_of_a_configuration_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder") as raised:
        load_configuration(str(tmp_path))
    assert str(raised.value).startswith(str(tmp_path))
