"""Commands and groups of casfs: their help, and suggestions for an unknown command."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

import click

_WORDS_OF_OTHERS = {
    "archive": ("backup",),
    "cat": ("dump",),
    "compact": ("prune",),
    "create": ("backup", "init"),
    "delete": ("forget",),
    "extract": ("restore", "dump"),
    "gc": ("prune",),
    "history": ("log",),
    "info": ("stats", "snapshots"),
    "list": ("snapshots", "ls"),
    "passwd": ("key",),
    "rebuild-index": ("repair",),
    "remove": ("forget",),
    "rm": ("forget",),
    "save": ("backup",),
    "scrub": ("check",),
    "unlock": ("locks",),
    "verify": ("check",),
}
"""Names that other backup programs give to a command, and the commands here."""


MAX_HELP_CHARACTERS = 100
"""The help uses the width of the terminal up to this."""


class SharedOption(click.Option):
    """An option that many commands have: their help names it, and `casfs help options` describes it."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return None, which leaves the option out of the list of options."""
        return None


class Verb(click.Command):
    """A command whose help ends with the names of the shared options that it takes, and with examples."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options; of the shared ones only the names."""
        super().format_options(ctx, formatter)
        _write_shared_options(self, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        from casfs.cli.examples import write_examples

        write_examples(ctx.command_path.partition(" ")[2], formatter)

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the first sentence of the help, whatever the limit."""
        return _summary(self)


class SuggestingGroup(click.Group):
    """A group of verbs; its message about an unknown command names those that may have been meant."""

    command_class = Verb

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options and commands; of the shared options only the names."""
        super().format_options(ctx, formatter)
        _write_shared_options(self, formatter)

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the first sentence of the help, whatever the limit."""
        return _summary(self)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the arguments begin with; raise UsageError where there is none."""
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            message = unknown_command(args, self.list_commands(ctx))
            raise click.UsageError(message, ctx) from error


def describe_options(command: click.Command) -> list[tuple[str, str]]:
    """Return the names and the description of each option of a command, of shared ones too."""
    context = click.Context(command)
    found = [
        click.Option.get_help_record(option, context)
        for option in command.params
        if isinstance(option, click.Option)
    ]
    return [record for record in found if record is not None]


def _write_shared_options(command: click.Command, formatter: click.HelpFormatter) -> None:
    names = ["/".join(option.opts) for option in command.params if isinstance(option, SharedOption)]
    if names:
        with formatter.section("Common options (casfs help options)"):
            indent = " " * formatter.current_indent
            formatter.write(
                textwrap.fill(
                    ", ".join(names),
                    formatter.width,
                    initial_indent=indent,
                    subsequent_indent=indent,
                    break_on_hyphens=False,
                )
                + "\n"
            )


def _summary(command: click.Command) -> str:
    return " ".join((command.help or "").partition("\n\n")[0].split()).rstrip(".")


def unknown_command(args: list[str], commands: Iterable[str]) -> str:
    """Return the message about an unknown command, which is the first of the arguments."""
    name = args[0]
    if "/" in name and "-o" in args:
        return (
            f"there is no command {name}; for mount -t fuse.casfs, put the helper into /sbin: "
            'ln -s "$(command -v mount.fuse.casfs)" /sbin/'
        )
    close = suggested_commands(name, list(commands))
    return f"there is no command {name}" + (
        f"; did you mean {' or '.join(close)}?" if close else ""
    )


def suggested_commands(name: str, commands: list[str]) -> list[str]:
    """Return the commands that a mistyped or foreign name may mean, the most likely first."""
    import difflib

    foreign = [word for word in _WORDS_OF_OTHERS.get(name, ()) if word in commands]
    return foreign or difflib.get_close_matches(name.lower(), commands, n=2)
