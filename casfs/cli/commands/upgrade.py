"""The command upgrade: raise the format of a repository."""

from __future__ import annotations

import click

from casfs.cli.options import repository_options
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb


@click.command(cls=Verb)
@repository_options
@click.pass_obj
def upgrade(settings: Settings) -> None:
    """Upgrade the repository to the newest format.

    One durable step; no data are rewritten. In format 2, new directories and content lists go into packs of
    their own, below `meta`. Old packs stay as they are. Older versions of casfs cannot open the repository
    afterwards, and no command turns the format back. The command needs no key, and waits for no backup of
    another machine. A repository of the newest format stays unchanged.
    """
    from casfs.repository.upgrade import upgrade_repository

    result = upgrade_repository(settings.repository())
    output = settings.output()
    if result.is_changed:
        output.line(f"upgraded from format {result.old_format} to format {result.new_format}")
    else:
        output.line(f"the repository has format {result.new_format} already; nothing was changed")
    output.emit(
        "upgrade",
        id=result.repository,
        old_format=result.old_format,
        new_format=result.new_format,
    )
