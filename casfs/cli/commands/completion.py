"""The command completion: print a shell's completion script."""

from __future__ import annotations

import click

from casfs.cli.options import output_options
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb


@click.command(cls=Verb)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@output_options
@click.pass_obj
def completion(settings: Settings, shell: str) -> None:
    """Print the completion script of a shell.

    It completes commands, options, snapshots, tags, hosts, paths inside SNAP:, and file names.

    \b
    bash: casfs completion bash > ~/.local/share/bash-completion/completions/casfs
    zsh:  casfs completion zsh > ~/.zfunc/_casfs    (with ~/.zfunc in fpath)
    fish: casfs completion fish > ~/.config/fish/completions/casfs.fish
    """
    from casfs.cli.shell_completion import completion_script

    text = completion_script(shell)
    output = settings.output()
    output.line(text.rstrip("\n"))
    output.emit("completion", shell=shell, script=text)
