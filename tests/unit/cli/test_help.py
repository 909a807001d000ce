"""The help of casfs and of each command: whole summaries, own options, and the names of the common ones."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

from casfs.cli.app import VERBS, casfs
from casfs.cli.options import shared_options_help
from casfs.cli.settings import Settings
from casfs.cli.verbs import SharedOption

MAX_CHARACTERS = 80


def every_command() -> Iterator[click.Context]:
    top = click.Context(casfs, info_name="casfs", obj=Settings())
    yield top
    for name in VERBS:
        command = casfs.get_command(top, name)
        assert command is not None
        context = click.Context(command, parent=top, info_name=name)
        yield context
        if isinstance(command, click.Group):
            for inner_name, inner in command.commands.items():
                yield click.Context(inner, parent=context, info_name=inner_name)


@pytest.fixture(autouse=True)
def narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(MAX_CHARACTERS))


def help_of(context: click.Context) -> str:
    return context.command.get_help(context)


def test_no_line_of_any_help_is_wider_than_the_terminal_or_cut() -> None:
    for context in every_command():
        lines = help_of(context).splitlines()
        wide = [line for line in lines if len(line) > MAX_CHARACTERS]
        summaries = [line for line in lines if line.startswith("  ") and line[2:3].isalpha()]
        cut = [line for line in summaries if line.endswith("...")]
        assert (context.command_path, wide, cut) == (context.command_path, [], [])


def test_every_summary_of_a_command_fits_on_its_line() -> None:
    for context in every_command():
        if not isinstance(context.command, click.Group):
            continue
        lines = help_of(context).splitlines()
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            assert command is not None
            summary = command.get_short_help_str()
            assert summary and [line for line in lines if line.split() == [name, *summary.split()]]


def test_the_help_of_a_command_names_the_common_options_and_describes_its_own() -> None:
    (context,) = (one for one in every_command() if one.command_path == "casfs snapshots")
    text = help_of(context)
    options, _, common = text.partition("Common options (casfs help options):")
    assert "--latest N" in options and "--repo REPOSITORY" in options
    assert "--passphrase-command" in common and "Examples:" in common
    assert "--passphrase-command" not in options


def test_the_help_of_the_common_options_describes_each_of_them() -> None:
    described = shared_options_help()
    shared = {
        option.opts[-1]
        for context in every_command()
        for option in context.command.params
        if isinstance(option, SharedOption)
    }
    assert len(shared) >= 9
    assert {name for name in shared if f"{name} " not in described} == set()
