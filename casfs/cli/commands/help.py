"""The command help: print the help of casfs or of a command."""

from __future__ import annotations

import click

from casfs.cli.options import output_options, shared_options_help
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb, unknown_command


@click.command("help", cls=Verb)
@click.argument("words", nargs=-1, metavar="[COMMAND [SUBCOMMAND]]")
@output_options
@click.pass_context
def show_help(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Print the help of casfs, of a command, or of the common options.

    `casfs help options` describes the options that most commands have.
    """
    output = ctx.ensure_object(Settings).output()
    if words == ("options",):
        text = shared_options_help()
        output.line(text)
        output.emit("help", command="casfs help options", text=text)
        return
    found = ctx.parent
    assert found is not None
    for position, word in enumerate(words):
        group = found.command
        if not isinstance(group, click.Group):
            raise click.UsageError(f"{found.command_path} has no command {word}", ctx)
        command = group.get_command(found, word)
        if command is None:
            message = unknown_command(list(words[position:]), group.list_commands(found))
            raise click.UsageError(message, ctx)
        found = click.Context(command, parent=found, info_name=word)
    text = found.get_help()
    output.line(text)
    output.emit("help", command=found.command_path, text=text)
