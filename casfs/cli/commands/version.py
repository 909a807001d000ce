"""The command version: print the versions in use."""

from __future__ import annotations

import sys

import click

from casfs import __version__
from casfs.cli.options import output_options
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.format.versions import NEWEST_FORMAT


@click.command(cls=Verb)
@output_options
@click.pass_obj
def version(settings: Settings) -> None:
    """Print the versions of casfs, its format and Python."""
    output = settings.output()
    python = sys.version.split(maxsplit=1)[0]
    output.line(f"casfs {__version__} (repository format {NEWEST_FORMAT}, Python {python})")
    output.emit("version", casfs=__version__, format=NEWEST_FORMAT, python=python)
