"""The command completion: print a shell's completion script."""

from __future__ import annotations

import click

from casfs.cli.settings import Settings, common_options


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common_options
@click.pass_obj
def completion(settings: Settings, shell: str) -> None:
    """Print the completion script of a shell; the README says where to put it."""
    from click.shell_completion import get_completion_class

    from casfs.cli.app import casfs

    found = get_completion_class(shell)
    assert found is not None
    # click's own entry point runs bash to learn its version; the template of the class needs no process.
    script = found(casfs, {}, "casfs", "_CASFS_COMPLETE")
    text = script.source_template % script.source_vars()
    output = settings.output()
    output.line(text)
    output.emit("completion", shell=shell, script=text)
