"""The examples in the help: each command has some, and each is a line that the command accepts."""

from __future__ import annotations

import shlex

import click
import pytest

from casfs.cli.app import VERBS, casfs
from casfs.cli.examples import EXAMPLES
from casfs.cli.settings import Settings


def names_of_commands() -> set[str]:
    context = click.Context(casfs)
    names = set()
    for verb in VERBS:
        command = casfs.get_command(context, verb)
        if isinstance(command, click.Group):
            names |= {f"{verb} {inner}" for inner in command.commands}
        else:
            names.add(verb)
    return names


def test_every_command_has_examples() -> None:
    assert set(EXAMPLES) == names_of_commands()


@pytest.mark.parametrize(
    ("name", "example"),
    [(name, example) for name, examples in EXAMPLES.items() for example in examples],
)
def test_an_example_is_a_line_that_the_command_accepts(name: str, example: str) -> None:
    line = next(part.strip() for part in example.split("|") if "casfs " in part)
    words = shlex.split(line.partition(" > ")[0])
    assert words[0] == "casfs"
    context: click.Context = casfs.make_context("casfs", words[1:], obj=Settings())
    found: list[str] = []
    while isinstance(context.command, click.Group):
        rest = [*context._protected_args, *context.args]
        inner_name, command, rest = context.command.resolve_command(context, rest)
        assert command is not None and inner_name is not None
        found.append(inner_name)
        context = command.make_context(inner_name, rest, parent=context)
    assert " ".join(found) == name


def test_the_help_of_a_command_ends_with_its_examples() -> None:
    context = click.Context(casfs, info_name="casfs")
    command = casfs.get_command(context, "restore")
    assert command is not None
    text = command.get_help(click.Context(command, context, info_name="restore"))
    assert text.rstrip().splitlines()[-1].strip() == EXAMPLES["restore"][-1]
