"""The command config: show what the configuration holds and where each value comes from."""

from __future__ import annotations

import json
from itertools import groupby

import click

from casfs.cli.options import configuration_options
from casfs.cli.settings import Settings
from casfs.cli.verbs import SuggestingGroup
from casfs.errors import NotFoundError


@click.group(cls=SuggestingGroup)
@configuration_options
def config() -> None:
    """Show the configuration: named repositories and profiles."""


@config.command()
@configuration_options
@click.pass_obj
def show(settings: Settings) -> None:
    """Print every value, and the file and line that it comes from.

    The path of a ping is left out, because it works like a password. A value that is not set is
    printed with --json only, as null.
    """
    from casfs.config.file import SYSTEM_FILE, user_file
    from casfs.config.listing import list_values

    configuration = settings.configuration()
    if not configuration.files:
        raise NotFoundError(
            f"no configuration file exists; write {user_file()} or {SYSTEM_FILE}, or name a file with "
            "--config"
        )
    output = settings.output()
    for file in configuration.files:
        output.line(f"# {file.path}")
        output.emit("configuration", file=str(file.path))
    for (section, name), values in groupby(
        list_values(configuration), lambda value: (value.section, value.name)
    ):
        output.line(f"\n[{section}.{name}]")
        for value in values:
            output.emit(
                "value",
                section=value.section,
                name=value.name,
                setting=value.key,
                value=value.value,
                file=value.file if value.line is not None else None,
                line=value.line,
            )
            if value.value is None:
                continue
            origin = "default" if value.line is None else f"{value.file}:{value.line}"
            text = f"{value.key} = {json.dumps(value.value, ensure_ascii=False)}"
            output.line(f"{text:<47} # {origin}")
