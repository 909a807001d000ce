"""Groups of commands that suggest a command for a name that they do not know."""

from __future__ import annotations

import difflib
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


class SuggestingGroup(click.Group):
    """A group whose message about an unknown command names the commands that may have been meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the arguments begin with; raise UsageError where there is none."""
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            message = unknown_command(args, self.list_commands(ctx))
            raise click.UsageError(message, ctx) from error


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
    foreign = [word for word in _WORDS_OF_OTHERS.get(name, ()) if word in commands]
    return foreign or difflib.get_close_matches(name.lower(), commands, n=2)
