"""The options that several commands share; their values go into the context's `Settings`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from casfs.cli.param_types import COUNT, PATTERN, RATE, TAGS, parse_time
from casfs.cli.settings import Settings
from casfs.cli.verbs import MAX_HELP_CHARACTERS, SharedOption, Verb, describe_options
from casfs.errors import CasfsError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _setting(
    *names: str,
    field: str,
    value: Any = None,
    is_shared: bool = True,
    is_eager: bool = True,
    **attributes: Any,
) -> Decorator:
    """Return an option that sets a field of the Settings, as a flag to `value`.

    An option that is not given changes nothing: it may have been given before the command.
    """
    is_flag = value is not None

    def store(ctx: click.Context, _: click.Parameter, given: Any) -> None:
        is_given = bool(given) if is_flag else given is not None and given != ()
        if is_given:
            setattr(ctx.ensure_object(Settings), field, value if is_flag else given)

    return click.option(
        *names,
        cls=SharedOption if is_shared else click.Option,
        is_flag=is_flag,
        is_eager=is_eager,
        expose_value=False,
        callback=store,
        **attributes,
    )


def _all_of(*options: Decorator) -> Decorator:
    """Return a decorator that adds several options, which the help lists in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def pattern_option(name: str, parameter: str, help_text: str) -> Decorator:
    """Return an option that takes patterns in gitignore syntax, as often as it is given."""
    return click.option(
        name, parameter, type=PATTERN, multiple=True, metavar="PATTERN", help=help_text
    )


def tags_option(name: str, parameter: str, help_text: str) -> Decorator:
    """Return an option that takes sets of tags, as often as it is given, and completes known tags."""
    return click.option(
        name,
        parameter,
        type=TAGS,
        multiple=True,
        metavar="TAG[,TAG...]",
        shell_complete=complete_tags,
        help=help_text,
    )


def keep_option(rule: str, letter: str, help_text: str) -> Decorator:
    """Return an option of a retention rule that keeps a number of snapshots."""
    return click.option(f"--keep-{rule}", f"-{letter}", type=COUNT, default=0, help=help_text)


upload_limit_option = _setting(
    "--limit-upload",
    field="upload_bytes_per_s",
    is_shared=False,
    is_eager=False,
    type=RATE,
    metavar="RATE",
    help="Send at most this many bytes per second to a remote repository, such as 500K.",
)

download_limit_option = _setting(
    "--limit-download",
    field="download_bytes_per_s",
    is_shared=False,
    is_eager=False,
    type=RATE,
    metavar="RATE",
    help="Fetch at most this many bytes per second from a remote repository.",
)

progress_options = _all_of(
    _setting(
        "-v",
        "--verbose",
        field="verbose",
        value=True,
        help="Print more about what is done: each file that is backed up or restored.",
    ),
    _setting(
        "-q",
        "--quiet",
        field="quiet",
        value=True,
        help="Print problems and errors only: no progress, no summary.",
    ),
    _setting(
        "--progress",
        field="progress",
        type=click.Choice(["auto", "never", "json"]),
        help="Show progress on a terminal, never, or as JSON lines once a second (with --json)"
        " [default: auto].",
    ),
)
"""The options of verbs that work for a while: `Settings.monitor` uses their values."""


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


output_options = _setting(
    "--json",
    field="as_json",
    value=True,
    is_shared=False,
    help="Print one JSON object per line.",
)
"""The option that every verb has."""

configuration_options = _all_of(
    _setting(
        "--config",
        field="config",
        metavar="FILE",
        help="The configuration [default: $CASFS_CONFIG, else ~/.config/casfs/config.toml and "
        "/etc/casfs/config.toml].",
    ),
    output_options,
)
"""The options of verbs that work with the configuration and open no repository themselves."""

snapshot_filter_options = _all_of(
    _setting(
        "--host",
        field="hosts",
        is_shared=False,
        is_eager=False,
        metavar="NAME",
        multiple=True,
        shell_complete=complete_hosts,
        help="Consider only snapshots of this host; repeatable.",
    ),
    _setting(
        "--tag",
        field="tags",
        is_shared=False,
        is_eager=False,
        metavar="TAG[,TAG...]",
        type=TAGS,
        multiple=True,
        shell_complete=complete_tags,
        help="Consider only snapshots with all of these tags; repeatable.",
    ),
    _setting(
        "--path",
        field="paths",
        is_shared=False,
        is_eager=False,
        metavar="PATH",
        multiple=True,
        help="Consider only snapshots with this path; repeatable.",
    ),
)
"""--host, --tag and --path, which select snapshots and narrow `latest`."""


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


repository_options = _all_of(
    _setting(
        "-r",
        "--repo",
        field="repo",
        is_shared=False,
        metavar="REPOSITORY",
        help="The repository: a path, a URL, or a name from the configuration "
        "[default: $CASFS_REPOSITORY].",
    ),
    click.option(
        "--allow-foreign-repository",
        cls=SharedOption,
        is_flag=True,
        expose_value=False,
        callback=_allow_foreign,
        help="Use a repository folder that belongs to another user, who can then change what is read "
        "[default: $CASFS_ALLOW_FOREIGN].",
    ),
    _setting(
        "--expect-repository",
        field="expected",
        metavar="DIGEST",
        help="Refuse another repository than the one with this id, or whose file config has this BLAKE3 "
        "digest [default: $CASFS_EXPECT_REPOSITORY].",
    ),
    configuration_options,
    _setting(
        "--no-sync",
        field="sync",
        value=False,
        is_shared=False,
        hidden=True,
        help="For tests only: do not sync to disk. A crash may lose published snapshots.",
    ),
)
"""The options of verbs that work on a repository and need no key."""


common_options = _all_of(repository_options, key_options)
"""The options of verbs that read a repository; their values are in the context's Settings."""


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
