"""The arguments of each step, and that the verbs understand them."""

from __future__ import annotations

import click
import msgspec
import pytest

from casfs.cli.app import casfs
from casfs.cli.settings import Settings
from casfs.config.profiles import CheckPlan, Keep, Profile
from casfs.config.values import AbsolutePath, Duration, Share, Size, SpanText, Tag
from casfs.run.outcome import StepName
from casfs.run.step_commands import step_arguments

SMALL = Profile(repository="nas", sources=(AbsolutePath("/home"),))
EVERYTHING = Profile(
    repository="nas",
    sources=(AbsolutePath("/home"), AbsolutePath("/-odd")),
    exclude=("-x", "*.tmp"),
    exclude_file=(AbsolutePath("/etc/excludes"),),
    exclude_caches=True,
    exclude_if_present=(".nobackup",),
    exclude_larger_than=Size("2G"),
    one_file_system=True,
    tags=(Tag("home"), Tag("daily")),
    attempts=5,
    patience=Duration("2m"),
    freeze="never",
    reread=True,
    changed_ok=True,
    compression=-3,
    keep=Keep(
        last=1,
        hourly=2,
        daily=3,
        weekly=4,
        monthly=5,
        yearly="unlimited",
        within=SpanText("1y6m"),
        tags=(Tag("keep"),),
    ),
    check=CheckPlan(older_than=Duration("30d"), max_duration=Duration("20m")),
    mirror_to=("cloud",),
)


def parse(arguments: list[str]) -> click.Context:
    """Return the context of a command that click has parsed the arguments of."""
    verb = casfs.get_command(click.Context(casfs), arguments[0])
    assert verb is not None
    return verb.make_context(arguments[0], arguments[1:], obj=Settings())


def understood(arguments: list[str]) -> dict[str, object]:
    """Return the parameters that click parses from the arguments of a command."""
    return parse(arguments).params


def test_a_small_profile_backs_up_its_sources_alone() -> None:
    arguments = step_arguments(StepName.BACKUP, None, "home", SMALL, "vm")
    assert arguments == ["backup", "--host=vm", "--tag=profile:home", "--", "/home"]


def test_backup_understands_every_key_of_a_profile() -> None:
    arguments = step_arguments(StepName.BACKUP, None, "home", EVERYTHING, "vm")
    found = understood(arguments)
    assert found["paths"] == ("/home", "/-odd")
    patterns = found["excludes"]
    assert [pattern.text for pattern in patterns] == [b"-x", b"*.tmp"]  # type: ignore[attr-defined]
    assert [str(path) for path in found["exclude_files"]] == ["/etc/excludes"]  # type: ignore[attr-defined]
    assert found["exclude_if_present"] == (".nobackup",)
    assert found["exclude_larger_than"] == 2 * 1024**3
    assert found["tags"] == ({"profile:home"}, {"home"}, {"daily"})
    assert (found["host"], found["attempts"], found["patience_s"]) == ("vm", 5, 120)
    assert (found["freeze"], found["compression"]) == ("never", -3)
    for flag in ("exclude_caches", "one_file_system", "reread", "changed_ok"):
        assert found[flag] is True


def test_forget_is_limited_to_the_snapshots_of_the_profile() -> None:
    context = parse(step_arguments(StepName.FORGET, None, "home", EVERYTHING, "vm"))
    found, settings = context.params, context.obj
    assert (settings.hosts, settings.tags) == (("vm",), ({"profile:home"},))
    assert (settings.paths, found["group_by"]) == ((), "host,paths")
    counts = [found[f"keep_{name}"] for name in ("last", "hourly", "daily", "weekly", "monthly")]
    assert counts == [1, 2, 3, 4, 5]
    assert (found["keep_yearly"], found["keep_tags"]) == (-1, ({"keep"},))
    assert found["keep_within"].text == "1y6m"


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (CheckPlan(every=Duration("1d")), []),
        (CheckPlan(read_data=True), ["--read-data"]),
        (CheckPlan(older_than=Duration("30d")), ["--read-data", "--older-than=30d"]),
        (
            CheckPlan(read_data_subset=Share("5%"), max_duration=Duration("20m")),
            ["--read-data-subset=5%", "--max-duration=20m"],
        ),
    ],
)
def test_a_check_reads_data_where_the_profile_says_which(
    plan: CheckPlan, expected: list[str]
) -> None:
    profile = msgspec.structs.replace(SMALL, check=plan)
    arguments = step_arguments(StepName.CHECK, None, "home", profile, "vm")
    assert arguments == ["check", *expected]
    understood(arguments)


def test_prune_and_mirror_are_given_what_they_need() -> None:
    assert step_arguments(StepName.PRUNE, None, "home", SMALL, "vm") == ["prune"]
    assert step_arguments(StepName.MIRROR, "cloud", "home", EVERYTHING, "vm") == ["mirror", "cloud"]
