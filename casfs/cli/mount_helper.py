"""`mount.fuse.casfs`: mount(8) runs it for `mount -t fuse.casfs REPOSITORY MOUNTPOINT -o OPTIONS`.

With it a repository can be mounted from fstab and from systemd's mount units. It accepts casfs's own
options, ignores those that mount(8), systemd and others put into the same list, and refuses all others.
The exit codes are those of mount(8).
"""

from __future__ import annotations

import getopt
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from casfs.cli.commands.mount import server
from casfs.cli.key_options import KeyOptions, unlock_repository
from casfs.cli.param_types import OWNER, SIZE
from casfs.display import single_line
from casfs.errors import CasfsError, UsageError

EXIT_USAGE = 1
EXIT_FAILED = 32

_FLAGS = frozenset(("nodev", "noexec", "nosuid", "dev", "exec", "suid"))
_IGNORED = frozenset(
    (
        *("_netdev", "async", "atime", "auto", "defaults", "diratime", "fail", "group", "lazytime"),
        *("noatime", "noauto", "nodiratime", "nofail", "nogroup", "norelatime", "nostrictatime"),
        *("nouser", "nousers", "owner", "relatime", "ro", "rw", "silent", "strictatime", "user"),
        *("users", "nolazytime", "nosymfollow"),
    )
)
_IGNORED_PREFIXES = ("x-", "X-", "comment=", "user=", "uhelper=", "helper=")


@dataclass(frozen=True, slots=True)
class Invocation:
    """The arguments of mount(8); with `fake` they are checked and nothing is mounted."""

    repository: str
    mountpoint: Path
    options: tuple[str, ...]
    fake: bool


@dataclass(slots=True)
class MountOptions:
    """The values of casfs's own options."""

    snapshot: str | None = None
    allow_other: bool = False
    uid: int | None = None
    gid: int | None = None
    cache_size: int = 0
    deny_changed: bool = False
    no_kernel_cache: bool = False
    log_file: Path | None = None
    keys: KeyOptions = field(default_factory=KeyOptions)
    flags: tuple[str, ...] = ()

    def owner(self) -> tuple[int, int] | None:
        """Return the user and group that own every entry of the mount, or None."""
        if self.uid is None and self.gid is None:
            return None
        if self.uid is None or self.gid is None:
            raise UsageError("uid= and gid= are given both or not at all")
        return self.uid, self.gid


def parse_arguments(arguments: Sequence[str]) -> Invocation:
    """Parse `REPOSITORY MOUNTPOINT [-fnsv] [-N NAMESPACE] [-t TYPE] [-o OPTIONS]`; raise UsageError."""
    try:
        found, names = getopt.gnu_getopt(list(arguments), "fnsvN:o:t:")
    except getopt.GetoptError as error:
        raise UsageError(str(error)) from error
    if len(names) != 2:
        raise UsageError("usage: mount.fuse.casfs REPOSITORY MOUNTPOINT [-o OPTIONS]")
    given = [value for name, value in found if name == "-o"]
    return Invocation(
        names[0],
        Path(names[1]),
        tuple(option for text in given for option in split_options(text)),
        any(name == "-f" for name, _ in found),
    )


def split_options(text: str) -> list[str]:
    """Split a list of options at its commas; `\\,` and a comma in double quotes do not separate."""
    options = [""]
    quoted = False
    rest = iter(text)
    for character in rest:
        if character == "\\":
            options[-1] += next(rest, "\\")
        elif character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            options.append("")
        else:
            options[-1] += character
    return [option for option in options if option]


def parse_options(options: Sequence[str]) -> MountOptions:
    """Return the values of the options; raise UsageError for an unknown option."""
    wanted = MountOptions()
    for option in options:
        name, equals, value = option.partition("=")
        name = name.replace("-", "_") if name in _SWITCHES_WITH_HYPHENS else name
        if equals and name in _VALUES:
            _set_value(wanted, name, value)
        elif option in _FLAGS:
            wanted.flags = (*wanted.flags, option)
        elif not equals and name in ("allow_other", "deny_changed", "no_kernel_cache"):
            setattr(wanted, name, True)
        elif option not in _IGNORED and not option.startswith(_IGNORED_PREFIXES):
            raise UsageError(f"unknown option {option}")
    return wanted


_VALUES = frozenset(
    ("snapshot", "uid", "gid", "cache_size", "log_file", "identity", "passphrase_file")
)
_SWITCHES_WITH_HYPHENS = frozenset(
    (
        *("allow-other", "deny-changed", "no-kernel-cache", "cache-size", "log-file"),
        "passphrase-file",
    )
)


def _set_value(wanted: MountOptions, name: str, value: str) -> None:
    try:
        if name in ("uid", "gid"):
            setattr(wanted, name, OWNER.convert(f"{value}:{value}", None, None)[0])
        elif name == "cache_size":
            wanted.cache_size = SIZE.convert(value, None, None)
        elif name == "log_file":
            wanted.log_file = Path(value)
        elif name == "identity":
            wanted.keys.files.append(value)
        elif name == "passphrase_file":
            wanted.keys.passphrase.file = value
        else:
            wanted.snapshot = value
    except click.UsageError as error:
        raise UsageError(f"{name}: {error.message}") from error


def run(arguments: Sequence[str]) -> None:
    """Mount as the arguments say; return when the mount is usable. Raises CasfsError."""
    invocation = parse_arguments(arguments)
    wanted = parse_options(invocation.options)
    from casfs.repository.place import place_of
    from casfs.storage.base import StorageOptions
    from casfs.storage.url import parse_address

    serving = server()
    place = place_of(parse_address(invocation.repository), StorageOptions())
    identities = None
    if not invocation.fake:
        identities = unlock_repository(place, wanted.keys.unlock)
    request = serving.MountRequest(
        repository=place,
        mountpoint=invocation.mountpoint,
        snapshot=wanted.snapshot,
        allow_other=wanted.allow_other,
        owner=wanted.owner(),
        cache_bytes=wanted.cache_size or serving.DEFAULT_CACHE_BYTES,
        deny_changed=wanted.deny_changed,
        kernel_cache=not wanted.no_kernel_cache,
        log_file=wanted.log_file,
        flags=wanted.flags,
        identities=identities,
    )
    if not invocation.fake:
        serving.mount_in_background(request)


def main() -> None:
    """Run the command and exit with a code of mount(8)."""
    # mount(8) may start it without standard streams; a repository file must not get their numbers.
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    try:
        run(sys.argv[1:])
    except CasfsError as error:
        print(f"mount.fuse.casfs: {single_line(str(error))}", file=sys.stderr)
        sys.exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_FAILED)
