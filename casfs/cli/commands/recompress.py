"""The command recompress: store all packs again at another compression level."""

from __future__ import annotations

import click

from casfs.cli.commands.prune import run_prune
from casfs.cli.options import common_options
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb


@click.command(cls=Verb)
@click.option(
    "--compression",
    "level",
    type=click.IntRange(-7, 22),
    required=True,
    metavar="LEVEL",
    help="The zstd compression level, -7 to 22.",
)
@click.option("--dry-run", "-n", is_flag=True, help="Print the plan; change nothing.")
@common_options
@click.pass_obj
def recompress(settings: Settings, level: int, dry_run: bool) -> None:
    """Store all needed data again at another compression level.

    Safe while backups and mounts run. Every blob is verified before it is stored again. It needs free space
    for the new packs until the old ones are removed.
    """
    from casfs.maintenance.prune_plan import PruneOptions

    run_prune(settings, PruneOptions(dry_run=dry_run, repack_all=True), level)
