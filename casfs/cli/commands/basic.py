"""The small verbs: init, stats, tag, version, completion."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import click

from casfs import __version__
from casfs.cli.app import Settings, common_options
from casfs.cli.commands.key import named_recipients, recipient_options
from casfs.cli.key_options import new_passphrase
from casfs.cli.output import iso_time, shown, shown_id, shown_size
from casfs.cli.tags import tags_in
from casfs.errors import UsageError


@click.command()
@click.argument("path", required=False)
@recipient_options
@common_options
@click.pass_obj
def init(
    settings: Settings,
    path: str | None,
    recipients: tuple[str, ...],
    recipients_files: tuple[Path, ...],
    passphrase: bool,
) -> None:
    """Make a repository; refuse where one is.

    With recipients or a passphrase everything in it is encrypted: it can be written to by whoever may
    write in its folder, and read by whoever has an identity or the passphrase. That is decided here for
    the repository's whole life; who the recipients are can be changed later (casfs key).
    """
    from casfs.format.config import FORMAT_VERSION
    from casfs.repository.repository import Repository

    if path is not None and settings.repo is not None and path != settings.repo:
        raise UsageError("two repositories were named; give one")
    root = Path(path) if path is not None else settings.repository_path()
    keys = settings.keys.with_environment()
    new = None
    if passphrase or keys.passphrase.is_given():
        new = new_passphrase(keys.passphrase, "--passphrase-file, -fd or -command")
    wanted = named_recipients(recipients, recipients_files)
    config = Repository.create(root, wanted, new)
    output = settings.output()
    output.line(f"made repository {config.id[:12]} in {shown(bytes(root))}")
    if config.encryption is None:
        output.line("it is not encrypted: whoever can read the folder can read what is stored")
    else:
        values = [f"{one.kind} {one.value}" for one in wanted]
        values += ["a passphrase"] if new is not None else []
        output.line(f"it is encrypted to {', '.join(values)}")
        output.line(
            "without one of these nothing in it can ever be read again: keep them apart from it"
        )
    output.emit(
        "repository",
        id=config.id,
        path=str(root),
        format=FORMAT_VERSION,
        encrypted=config.encryption is not None,
    )


@click.command()
@common_options
@click.pass_obj
def version(settings: Settings) -> None:
    """Print the versions of casfs, of its repository format and of Python."""
    from casfs.format.config import FORMAT_VERSION

    output = settings.output()
    python = platform.python_version()
    output.line(f"casfs {__version__} (repository format {FORMAT_VERSION}, Python {python})")
    output.emit("version", casfs=__version__, format=FORMAT_VERSION, python=python)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common_options
@click.pass_obj
def completion(settings: Settings, shell: str) -> None:
    """Print the completion script of a shell; see the README for where it goes."""
    from click.shell_completion import get_completion_class

    from casfs.cli.app import casfs

    found = get_completion_class(shell)
    assert found is not None
    # click's own script asks for the version of bash; reading `source` from the class avoids that.
    script = found(casfs, {}, "casfs", "_CASFS_COMPLETE")
    text = script.source_template % script.source_vars()
    output = settings.output()
    output.line(text)
    output.emit("completion", shell=shell, script=text)


@click.command()
@click.argument("snap", metavar="SNAP")
@click.option("--add", "added", multiple=True, metavar="TAG[,TAG...]", help="Add tags.")
@click.option("--remove", "removed", multiple=True, metavar="TAG[,TAG...]", help="Remove tags.")
@click.option("--set", "replaced", multiple=True, metavar="TAG[,TAG...]", help="Have just these.")
@common_options
@click.pass_obj
def tag(
    settings: Settings,
    snap: str,
    added: tuple[str, ...],
    removed: tuple[str, ...],
    replaced: tuple[str, ...],
) -> None:
    """Change a snapshot's tags; it gets a new id, its content stays the same."""
    from casfs.repository.repository import Repository
    from casfs.repository.tagging import retag

    if not (added or removed or replaced):
        raise UsageError("say what to change: --add, --remove or --set")
    if replaced and (added or removed):
        raise UsageError("--set does not go with --add or --remove")
    wanted = tags_in(replaced or added)
    # One that has a comma, or no name, may be there from before such were refused.
    unwanted = {tag for text in removed for tag in (text, *text.split(","))}
    with Repository.open(
        settings.repository_path(), "tag", sync=settings.sync, unlock=settings.unlock
    ) as repository:
        old_id, old = repository.resolve(snap)
        tags = wanted if replaced else set(old.tags) - unwanted | wanted
        new_id, new = retag(repository, old_id, old, tuple(sorted(tags)))
    output = settings.output()
    shown_tags = ", ".join(shown(os.fsencode(tag)) for tag in new.tags) or "none"
    output.line(f"snapshot {shown_id(old_id)} is now {shown_id(new_id)}, tags: {shown_tags}")
    output.emit(
        "snapshot",
        id=new_id.hex(),
        replaces=old_id.hex(),
        time=iso_time(new.time_ns),
        tags=list(new.tags),
    )


@click.command()
@click.argument("snap", metavar="[SNAP[:PATH]]", required=False)
@common_options
@click.pass_obj
def stats(settings: Settings, snap: str | None) -> None:
    """Print sizes: of the whole repository, or of what a snapshot holds."""
    from casfs.query.stats import measure_repository, measure_snapshot
    from casfs.repository.repository import Repository

    output = settings.output()
    with Repository.open(settings.repository_path(), unlock=settings.unlock) as repository:
        if snap is not None:
            seen = measure_snapshot(repository, snap)
            output.line(f"entries:    {seen.entries}")
            output.line(f"size:       {shown_size(seen.total_bytes)}")
            output.line(f"flagged:    {seen.flagged}")
            output.line(f"blobs:      {seen.blobs}")
            output.line(
                f"stored:     {shown_size(seen.stored_bytes)} (without what others share: "
                f"{shown_size(seen.unique_stored_bytes)})"
            )
            output.emit(
                "stats",
                snapshot=seen.snapshot_id.hex(),
                entries=seen.entries,
                bytes=seen.total_bytes,
                flagged=seen.flagged,
                blobs=seen.blobs,
                stored_bytes=seen.stored_bytes,
                unique_stored_bytes=seen.unique_stored_bytes,
            )
            return
        whole = measure_repository(repository)
    output.line(f"snapshots:  {whole.snapshots}")
    output.line(f"packs:      {whole.packs} ({shown_size(whole.pack_bytes)})")
    output.line(f"blobs:      {whole.blobs} ({shown_size(whole.plain_bytes)} before compression)")
    output.line(f"contents:   {shown_size(whole.total_bytes)} in all snapshots")
    output.emit(
        "stats",
        snapshots=whole.snapshots,
        packs=whole.packs,
        pack_bytes=whole.pack_bytes,
        blobs=whole.blobs,
        plain_bytes=whole.plain_bytes,
        bytes=whole.total_bytes,
    )
