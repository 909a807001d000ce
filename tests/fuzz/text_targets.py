"""What people and programs write: configuration, patterns, values of options, tables of the kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import click
import msgspec

from casfs.backup.mount_table import outermost_served, parse_table
from casfs.cli import param_types
from casfs.cli.mount_helper import parse_options, split_options
from casfs.config.file import parse_file
from casfs.display import escape_path, single_line
from casfs.errors import ConfigError, UsageError
from casfs.maintenance.retention import CalendarSpan, parse_duration
from casfs.paths import normalize_source_path, parse_snapshot_path, split
from casfs.patterns import PatternMatcher, parse_patterns
from casfs.run.processes import VerbOutput
from casfs.run.state import ProfileFiles, ProfileState
from casfs.schedule.calendar import parse_calendar
from casfs.storage.url import parse_address
from tests.fuzz.target import Target, text_of

_PATHS = [b"/a/b", b"/home/x/.cache/y", b"a" * 40, b"/" + b"ab/" * 12]


def _patterns(data: bytes) -> None:
    patterns = parse_patterns(data, "ignore")
    matcher = PatternMatcher(patterns)
    for path in _PATHS:
        for is_directory in (False, True):
            matcher.matches(path, is_directory)
            for pattern in patterns[:4]:
                pattern.matches(path, is_directory)


_IGNORE = b"# cache\n*.o\n!keep.o\n/build/\n**/tmp/*\n[a-z[:digit:]]?\\ \n**/**/x/**\n"


def _converted(kind: click.ParamType[object]) -> Callable[[bytes], None]:
    def parse(data: bytes) -> None:
        kind.convert(text_of(data), None, None)

    return parse


def _time(data: bytes) -> None:
    found = param_types.parse_time(text_of(data), "--as-of")
    assert -(1 << 63) <= found < 1 << 63


def _duration(data: bytes) -> None:
    assert parse_duration(text_of(data), "--margin") >= 0


def _span(data: bytes) -> None:
    CalendarSpan(text_of(data), "--keep-within").before_ns(1_800_000_000_000_000_000)


def _toml(data: bytes) -> None:
    parse_file(Path("/etc/casfs/config.toml"), data.decode("utf-8", "replace"))


_TOML = b"""[repositories.disk]
url = "/mnt/backup"

[profiles.home]
repository = "disk"
sources = ["/home", "/etc"]
exclude = ["*.o"]
exclude-larger-than = "1.5G"
schedule = "daily"
"""


def _calendar(data: bytes) -> None:
    parse_calendar(text_of(data)).cron_fields()


def _address(data: bytes) -> None:
    parse_address(text_of(data))


def _path(data: bytes) -> None:
    normalize_source_path(data)
    for part in split(parse_snapshot_path(text_of(data))):
        assert part and b"/" not in part
    shown = escape_path(data)
    assert shown.isprintable() and single_line(text_of(data)).isprintable()


def _mounts(data: bytes) -> None:
    served = outermost_served(parse_table(data))
    assert b"/" not in served


def _options_of_fstab(data: bytes) -> None:
    parse_options(split_options(text_of(data)))


def _output_of_a_step(data: bytes) -> None:
    output = VerbOutput()
    for line in data.split(b"\n"):
        output.add_line(line)


def _record_of_runs(data: bytes) -> None:
    files = ProfileFiles("fuzzed", Path("/etc/casfs/config.toml"))
    files.save(ProfileState(profile="fuzzed"))
    files._state.write_bytes(data)
    state = files.load()
    with contextlib.suppress(ValueError):
        assert msgspec.json.decode(msgspec.json.encode(state), type=ProfileState) == state


def _target(name: str, kind: object, *seeds: bytes) -> Target:
    convert = _converted(kind)  # type: ignore[arg-type]
    return Target(name, convert, lambda: list(seeds), (click.BadParameter, UsageError))


TARGETS = [
    Target("patterns", _patterns, lambda: [_IGNORE], (UsageError,)),
    Target("configuration", _toml, lambda: [_TOML], (ConfigError,)),
    Target("time", _time, lambda: [b"2026-11-28T10:00:00+01:00", b"@17.5"], (UsageError,)),
    Target("duration", _duration, lambda: [b"1h30m", b"2w"], (UsageError,)),
    Target("span", _span, lambda: [b"1y6m", b"36h"], (UsageError,)),
    Target("schedule", _calendar, lambda: [b"Mon..Fri 02:30", b"*-01,07-01 3:00"], (UsageError,)),
    Target(
        "place",
        _address,
        lambda: [b"s3://bucket/prefix", b"sftp://user@host:22/~/x%20y", b"file:///a", b"./a:b"],
        (UsageError,),
    ),
    Target("path", _path, lambda: [b"/a//b/../c", b"/\xff\xc3\xa4\n\x1b"], (UsageError,)),
    Target(
        "table of mounts",
        _mounts,
        lambda: [rb"36 35 98:0 / /mnt\0402 rw shared:1 - fuse.sshfs x rw"],
        (),
    ),
    Target(
        "options of fstab",
        _options_of_fstab,
        lambda: [b"rw,snapshot=latest,uid=1,cache-size=1G,passphrase-file=/a\\,b"],
        (UsageError,),
    ),
    Target(
        "output of a step",
        _output_of_a_step,
        lambda: [b'{"type":"problem","path":"a"}\n{"type":"summary","files":5}\n'],
        (),
    ),
    Target(
        "record of runs",
        _record_of_runs,
        lambda: [b'{"profile":"fuzzed","steps":{"backup":{"last_run_s":5.0}}}'],
        (),
        cost=4,
    ),
    _target("size", param_types.SIZE, b"10M", b"1.5 GiB"),
    _target("range of sizes", param_types.SIZE_RANGE, b"+10M", b"-1K"),
    _target("rate", param_types.RATE, b"10MiB/s"),
    _target("percentage", param_types.PERCENT, b"25%", b"0.5"),
    _target("count", param_types.COUNT, b"7", b"unlimited"),
    _target("owner", param_types.OWNER, b"1000:1000"),
    _target("tags", param_types.TAGS, b"a,b"),
    _target("pattern", param_types.PATTERN, b"*.o"),
]
