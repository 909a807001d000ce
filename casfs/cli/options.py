"""The options that several commands share; their values go into the context's `Settings`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from casfs.cli.param_types import RATE, TAGS, parse_time
from casfs.cli.settings import Settings
from casfs.cli.verbs import MAX_HELP_CHARACTERS, SharedOption, Verb, describe_options
from casfs.errors import CasfsError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def _set_upload_limit(ctx: click.Context, _: click.Parameter, value: int | None) -> None:
    ctx.ensure_object(Settings).upload_bytes_per_s = value


def _set_download_limit(ctx: click.Context, _: click.Parameter, value: int | None) -> None:
    ctx.ensure_object(Settings).download_bytes_per_s = value


upload_limit_option = click.option(
    "--limit-upload",
    type=RATE,
    metavar="RATE",
    expose_value=False,
    callback=_set_upload_limit,
    help="Send at most this many bytes per second to a remote repository, such as 500K.",
)


download_limit_option = click.option(
    "--limit-download",
    type=RATE,
    metavar="RATE",
    expose_value=False,
    callback=_set_download_limit,
    help="Fetch at most this many bytes per second from a remote repository.",
)


def key_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that open an encrypted repository; their values go into the Settings."""
    for name, metavar, help_text in (
        (
            "--passphrase-command",
            "COMMAND",
            "Run this command to get the passphrase [default: $CASFS_PASSPHRASE_COMMAND].",
        ),
        ("--passphrase-fd", "N", "Read the passphrase from this descriptor."),
        (
            "--passphrase-file",
            "FILE",
            "Read the passphrase from a file [default: $CASFS_PASSPHRASE_FILE].",
        ),
        (
            "--identity",
            "FILE",
            "Decrypt with this age identity or private SSH key; repeatable [default: $CASFS_IDENTITY].",
        ),
    ):
        command = click.option(
            name,
            cls=SharedOption,
            metavar=metavar,
            type=int if name == "--passphrase-fd" else str,
            multiple=name == "--identity",
            expose_value=False,
            callback=_set_key_option,
            is_eager=True,
            help=help_text,
        )(command)
    return command


def _set_key_option(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    keys = ctx.ensure_object(Settings).keys
    if parameter.name == "identity":
        keys.files += value
    elif value is not None:
        setattr(keys.passphrase, str(parameter.name).removeprefix("passphrase_"), value)


def _allow_foreign(context: click.Context, option: click.Parameter, value: bool) -> None:
    if value:
        from casfs.storage.folder import allow_foreign_folders

        allow_foreign_folders()


def _set_repo(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.ensure_object(Settings).repo = value


def _set_expected(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.ensure_object(Settings).expected = value


def _set_config(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.ensure_object(Settings).config = value


def _set_json(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Settings).as_json = True


def _set_no_sync(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Settings).sync = False


def _set_progress(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.ensure_object(Settings).progress = value


def _set_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Settings).verbose = True


def _set_quiet(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Settings).quiet = True


def progress_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of verbs that work for a while: `Settings.monitor` uses their values."""
    command = click.option(
        "--progress",
        cls=SharedOption,
        type=click.Choice(["auto", "never", "json"]),
        expose_value=False,
        callback=_set_progress,
        is_eager=True,
        help="Show progress on a terminal, never, or as JSON lines once a second (with --json)"
        " [default: auto].",
    )(command)
    command = click.option(
        "-q",
        "--quiet",
        cls=SharedOption,
        is_flag=True,
        expose_value=False,
        callback=_set_quiet,
        is_eager=True,
        help="Print problems and errors only: no progress, no summary.",
    )(command)
    return click.option(
        "-v",
        "--verbose",
        cls=SharedOption,
        is_flag=True,
        expose_value=False,
        callback=_set_verbose,
        is_eager=True,
        help="Print more about what is done: each file that is backed up or restored.",
    )(command)


def complete_profiles(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Return the profiles whose names begin like this; none where the configuration cannot be read."""
    try:
        names = ctx.ensure_object(Settings).configuration().profiles
    except CasfsError:
        return []
    return sorted(name for name in names if name.startswith(incomplete))


def complete_snapshots(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Return the snapshots, or the paths inside `SNAP:`, that begin like this."""
    from casfs.cli.shell_completion import snapshot_candidates

    return snapshot_candidates(ctx, parameter, incomplete)


def complete_tags(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Return the tags that snapshots have and that begin like this."""
    from casfs.cli.shell_completion import tag_candidates

    return tag_candidates(ctx, parameter, incomplete)


def complete_hosts(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Return the hosts that snapshots have and that begin like this."""
    from casfs.cli.shell_completion import host_candidates

    return host_candidates(ctx, parameter, incomplete)


def complete_folders(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Make the shell complete the names of folders."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option that every verb has."""
    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=_set_json,
        is_eager=True,
        help="Print one JSON object per line.",
    )(command)


def configuration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of verbs that work with the configuration and open no repository themselves."""
    command = output_options(command)
    return click.option(
        "--config",
        cls=SharedOption,
        metavar="FILE",
        expose_value=False,
        callback=_set_config,
        is_eager=True,
        help="The configuration [default: $CASFS_CONFIG, else ~/.config/casfs/config.toml and "
        "/etc/casfs/config.toml].",
    )(command)


def _set_filter(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    setattr(ctx.ensure_object(Settings), str(parameter.name), value)


def snapshot_filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --host, --tag and --path, which select snapshots and narrow `latest`."""
    command = click.option(
        "--path",
        "paths",
        metavar="PATH",
        multiple=True,
        expose_value=False,
        callback=_set_filter,
        help="Consider only snapshots with this path; repeatable.",
    )(command)
    command = click.option(
        "--tag",
        "tags",
        metavar="TAG[,TAG...]",
        type=TAGS,
        multiple=True,
        expose_value=False,
        callback=_set_filter,
        shell_complete=complete_tags,
        help="Consider only snapshots with all of these tags; repeatable.",
    )(command)
    return click.option(
        "--host",
        "hosts",
        metavar="NAME",
        multiple=True,
        expose_value=False,
        callback=_set_filter,
        shell_complete=complete_hosts,
        help="Consider only snapshots of this host; repeatable.",
    )(command)


def _set_as_of(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.ensure_object(Settings).as_of_ns = parse_time(value, "--as-of")


as_of_option = click.option(
    "--as-of",
    metavar="TIME",
    expose_value=False,
    callback=_set_as_of,
    help="Read a repository in a bucket with versions as it was at this time, before objects were deleted or "
    "overwritten; ISO 8601 or @SECONDS.",
)


def repository_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of verbs that work on a repository and need no key."""
    command = click.option(
        "--no-sync",
        is_flag=True,
        hidden=True,
        expose_value=False,
        callback=_set_no_sync,
        is_eager=True,
        help="For tests only: do not sync to disk. A crash may lose published snapshots.",
    )(command)
    command = configuration_options(command)
    command = click.option(
        "--expect-repository",
        cls=SharedOption,
        metavar="DIGEST",
        expose_value=False,
        callback=_set_expected,
        is_eager=True,
        help="Refuse another repository than the one with this id, or whose file config has this BLAKE3 "
        "digest [default: $CASFS_EXPECT_REPOSITORY].",
    )(command)
    command = click.option(
        "--allow-foreign-repository",
        cls=SharedOption,
        is_flag=True,
        expose_value=False,
        callback=_allow_foreign,
        help="Use a repository folder that belongs to another user, who can then change what is read "
        "[default: $CASFS_ALLOW_FOREIGN].",
    )(command)
    return click.option(
        "-r",
        "--repo",
        metavar="REPOSITORY",
        expose_value=False,
        callback=_set_repo,
        is_eager=True,
        help="The repository: a path, a URL, or a name from the configuration "
        "[default: $CASFS_REPOSITORY].",
    )(command)


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of verbs that read a repository; their values are in the context's Settings."""
    return repository_options(key_options(command))


def shared_options_help() -> str:
    """Return the text of `casfs help options`."""

    @click.command("options", cls=Verb)
    @progress_options
    @common_options
    def every_shared_option() -> None:
        pass

    formatter = click.Context(
        every_shared_option, max_content_width=MAX_HELP_CHARACTERS
    ).make_formatter()
    formatter.write_text(
        "Most commands take these options; the help of a command names those that it takes. "
        "The repository and the keys may be given before the command too."
    )
    with formatter.section("Common options"):
        formatter.write_dl(describe_options(every_shared_option))
    return formatter.getvalue().rstrip("\n")
