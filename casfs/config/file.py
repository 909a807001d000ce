"""Configuration files: find them, refuse those that other users can write, and read their tables.

A file that is named (`--config`, else CASFS_CONFIG) is the whole configuration. Otherwise casfs reads the
user's own file and the machine's, where they exist. A repository or a profile in the user's file replaces the
machine's of the same name as a whole, so that no table is a mixture of two files.

The files name commands that casfs runs, so casfs refuses a file that another user can write.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from casfs.config.lines import KeyPath
from casfs.config.names import NAME
from casfs.config.profiles import Profile
from casfs.config.repositories import NamedRepository
from casfs.config.validation import SourceFile, convert_table, parse_toml, unknown_key
from casfs.errors import ConfigError, NoHomeError, NotFoundError, StorageError
from casfs.user_dirs import user_folder

SYSTEM_FILE = Path("/etc/casfs/config.toml")
VARIABLE = "CASFS_CONFIG"

_MAX_FILE_BYTES = 1024 * 1024
_SECTIONS: dict[str, type[NamedRepository] | type[Profile]] = {
    "repositories": NamedRepository,
    "profiles": Profile,
}


@dataclass(frozen=True, slots=True)
class Configuration:
    """The contents of all files together, with every name resolved and every value checked."""

    files: tuple[SourceFile, ...] = ()
    repositories: Mapping[str, NamedRepository] = field(default_factory=dict)
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    origins: Mapping[tuple[str, str], SourceFile] = field(default_factory=dict)

    def profile(self, name: str) -> Profile:
        """Return a profile by its name; raises NotFoundError."""
        if name not in self.profiles:
            raise NotFoundError(self._not_configured("profile", name, self.profiles))
        return self.profiles[name]

    def repository(self, name: str) -> NamedRepository:
        """Return a repository by its name; raises NotFoundError."""
        if name not in self.repositories:
            raise NotFoundError(self._not_configured("repository", name, self.repositories))
        return self.repositories[name]

    def file_of(self, section: str, name: str) -> SourceFile:
        """Return the file that holds a table of `repositories` or `profiles`."""
        return self.origins[section, name]

    def _not_configured(self, what: str, name: str, known: Mapping[str, object]) -> str:
        read = ", ".join(str(file.path) for file in self.files)
        if not read:
            return (
                f"there is no {what} {name!r}: no configuration file exists; "
                f"write {user_file()} or {SYSTEM_FILE}, or name a file with --config"
            )
        names = ", ".join(sorted(known)) or "none"
        return f"there is no {what} {name!r} in {read}; there are: {names}"


def user_file() -> Path:
    """Return the path of this user's own configuration file."""
    return user_folder("XDG_CONFIG_HOME", ".config") / "config.toml"


def _usual_files() -> list[Path]:
    """Return the files that are read without a name, the later ones first in force."""
    try:
        return [SYSTEM_FILE, user_file()]
    except NoHomeError:
        return [SYSTEM_FILE]


def load_configuration(named: str | None = None) -> Configuration:
    """Read the configuration: the named file, else CASFS_CONFIG, else the user's and the machine's files.

    Raises ConfigError, NotFoundError for a named file that does not exist, and StorageError.
    """
    named = named or os.environ.get(VARIABLE) or None
    found: dict[tuple[str, str], NamedRepository | Profile] = {}
    origins: dict[tuple[str, str], SourceFile] = {}
    files = []
    for path in [Path(named).absolute()] if named is not None else _usual_files():
        text = _read(path)
        if text is None:
            if named is not None:
                raise NotFoundError(f"the configuration file {path} does not exist")
            continue
        file, tables = parse_file(path, text)
        files.append(file)
        found |= tables
        origins |= dict.fromkeys(tables, file)
    configuration = Configuration(
        tuple(files),
        {name: table for (_, name), table in found.items() if isinstance(table, NamedRepository)},
        {name: table for (_, name), table in found.items() if isinstance(table, Profile)},
        origins,
    )
    _require_repositories(configuration)
    return configuration


def parse_file(
    path: Path, text: str
) -> tuple[SourceFile, dict[tuple[str, str], NamedRepository | Profile]]:
    """Return the tables of a file by section and name; raises ConfigError for the first error in it."""
    document, file = parse_toml(path, text)
    tables: dict[tuple[str, str], NamedRepository | Profile] = {}
    for section, content in document.items():
        if section not in _SECTIONS:
            raise file.error((section,), unknown_key("table", section, list(_SECTIONS)))
        if not isinstance(content, dict):
            raise file.error((section,), f"must be a table; write [{section}.NAME]")
        for name, table in content.items():
            if not NAME.fullmatch(name):
                raise file.error(
                    (section, name),
                    "a name has letters, digits, and . _ - after the first, at most 64 in all",
                )
            if not isinstance(table, dict):
                raise file.error((section, name), f"must be a table; write [{section}.{name}]")
            tables[section, name] = convert_table(file, (section, name), table, _SECTIONS[section])
    return file, tables


def _require_repositories(configuration: Configuration) -> None:
    """Raise ConfigError if a profile names a repository that is in no file."""
    for name, profile in configuration.profiles.items():
        named: list[tuple[KeyPath, str]] = [(("repository",), profile.repository)]
        named += [(("mirror-to", n), other) for n, other in enumerate(profile.mirror_to)]
        for path, repository in named:
            if repository not in configuration.repositories:
                known = ", ".join(sorted(configuration.repositories)) or "none"
                raise configuration.file_of("profiles", name).error(
                    ("profiles", name, *path),
                    f"there is no [repositories.{repository}]; there are: {known}",
                )
            if path[0] == "mirror-to" and repository == profile.repository:
                raise configuration.file_of("profiles", name).error(
                    ("profiles", name, *path),
                    f"{repository!r} is the profile's own repository; name another place",
                )


def _read(path: Path) -> str | None:
    """Return the text of a file, or None if it does not exist; refuse one that other users can write."""
    try:
        # If the path is a FIFO, opening must not wait for its other end.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StorageError("read the configuration file", str(path), error) from error
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(str(path), None, "", "is a folder; name a file")
    with os.fdopen(fd, "rb") as file:
        try:
            _require_trusted(path, os.fstat(fd))
            data = file.read(_MAX_FILE_BYTES + 1)
        except OSError as error:
            raise StorageError("read the configuration file", str(path), error) from error
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(str(path), None, "", "is larger than 1 MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(str(path), line, "", "is not UTF-8") from error


def _require_trusted(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(str(path), None, "", "is not a regular file")
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            str(path), None, "", "belongs to another user, who could make casfs run any command"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            str(path),
            None,
            "",
            "can be written by other users, who could make casfs run any command; "
            "run chmod go-w on it",
        )
