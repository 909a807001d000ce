"""The command `casfs`: the table of its commands, the shared options, exit codes and signals.

The module of a command is imported only when the command is used, so that `casfs version` starts
quickly and only `casfs mount` needs FUSE.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import resource
import sys
from typing import TextIO

import click

from casfs import __version__, interruption
from casfs.cli import standard_streams
from casfs.cli.options import common_options, progress_options
from casfs.cli.output import Output, terminal_line
from casfs.cli.settings import Settings
from casfs.cli.standard_streams import OutputError
from casfs.cli.verbs import MAX_HELP_CHARACTERS, SuggestingGroup
from casfs.display import escape_path, single_line
from casfs.errors import CasfsError
from casfs.storage.interruption import INTERRUPTED

VERBS = {
    "init": "casfs.cli.commands.init:init",
    "backup": "casfs.cli.commands.backup:backup",
    "snapshots": "casfs.cli.commands.snapshots:snapshots",
    "ls": "casfs.cli.commands.ls:ls",
    "find": "casfs.cli.commands.find:find",
    "changed": "casfs.cli.commands.changed:changed",
    "diff": "casfs.cli.commands.diff:diff",
    "log": "casfs.cli.commands.log:log",
    "dump": "casfs.cli.commands.dump:dump",
    "mount": "casfs.cli.commands.mount:mount",
    "umount": "casfs.cli.commands.mount:umount",
    "restore": "casfs.cli.commands.restore:restore",
    "check": "casfs.cli.commands.check:check",
    "forget": "casfs.cli.commands.forget:forget",
    "prune": "casfs.cli.commands.prune:prune",
    "repair": "casfs.cli.commands.repair:repair",
    "run": "casfs.cli.commands.run:run",
    "config": "casfs.cli.commands.config:config",
    "schedule": "casfs.cli.commands.schedule:schedule",
    "copy": "casfs.cli.commands.copy:copy",
    "rewrite": "casfs.cli.commands.rewrite:rewrite",
    "recompress": "casfs.cli.commands.recompress:recompress",
    "mirror": "casfs.cli.commands.mirror:mirror",
    "upgrade": "casfs.cli.commands.upgrade:upgrade",
    "lock-policy": "casfs.cli.commands.lock_policy:lock_policy",
    "locks": "casfs.cli.commands.locks:locks",
    "stats": "casfs.cli.commands.stats:stats",
    "tag": "casfs.cli.commands.tag:tag",
    "key": "casfs.cli.commands.key:key",
    "help": "casfs.cli.commands.help:show_help",
    "version": "casfs.cli.commands.version:version",
    "completion": "casfs.cli.commands.completion:completion",
}

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREADABLE = 3
EXIT_CHANGED = 4
EXIT_DAMAGED = 5
EXIT_INTERRUPTED = interruption.EXIT_INTERRUPTED
EXIT_NO_READER = 141


PRINTING_VERBS = frozenset(
    [
        "snapshots",
        "ls",
        "find",
        "changed",
        "diff",
        "log",
        "dump",
        "config",
        "stats",
        "version",
        "completion",
        "help",
    ]
)
"""Verbs that only print. They end when their output cannot be written; all others finish their work first."""

_NO_THREAD = "can't start new thread"
"""Python's message for a thread that the system refuses to start."""

_PROCESS_LIMIT = (
    "this user runs as many processes and threads as are allowed (ulimit -u, or the limits of a container or "
    "a service); raise the limit or end others, and run the command again"
)

_COMPLETION_VARIABLE = "_CASFS_COMPLETE"
_OPEN_FILES = 16_384


class _Verbs(SuggestingGroup):
    """A group that imports the module of a command on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        target = VERBS.get(cmd_name)
        if target is None:
            return None
        module, _, name = target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        ctx.ensure_object(Settings).verb = name
        if name not in PRINTING_VERBS:
            standard_streams.keep_working()
        return name, command, rest


_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": MAX_HELP_CHARACTERS}


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        print(f"casfs {__version__}")
        ctx.exit()


@click.group(cls=_Verbs, context_settings=_CONTEXT)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Print the version, as the command version does.",
)
@progress_options
@common_options
def casfs() -> None:
    """Back up files as verified, deduplicated snapshots; restore them or mount them as a file system."""


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code; only a bug leaves a traceback."""
    as_json = "--json" in arguments
    try:
        interruption.begin()
        code = _run(arguments, as_json)
        interruption.end(code)
        return code
    except (KeyboardInterrupt, click.Abort):
        interruption.end(EXIT_INTERRUPTED)
        return _fail(as_json, interruption.MESSAGE, EXIT_INTERRUPTED)


def _run(arguments: list[str], as_json: bool) -> int:
    settings = Settings()
    try:
        _configure()
        code = _invoke(arguments, settings)
        settings.report_requests()
        error = standard_streams.write_error()
        if error is None:
            return code
        failed = _output_failed(as_json, error)
        return code or (0 if settings.verb in _keeps_code(error) else failed)
    except OutputError as error:
        return _output_failed(as_json, error.cause)
    except CasfsError as error:
        return _fail(as_json, str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return EXIT_USAGE
    except click.UsageError as error:
        from casfs.cli.usage_messages import usage_message

        hint = f" ({error.ctx.command_path} --help)" if error.ctx and error.ctx.parent else ""
        return _fail(as_json, usage_message(error) + hint, EXIT_USAGE)
    except click.ClickException as error:
        return _fail(as_json, error.format_message(), error.exit_code)
    except OSError as error:
        return _fail(as_json, _os_error_message(error), EXIT_FAILED)
    except RuntimeError as error:
        if str(error) != _NO_THREAD:
            raise
        return _fail(as_json, f"cannot start a thread: {_PROCESS_LIMIT}", EXIT_FAILED)


def _invoke(arguments: list[str], settings: Settings) -> int:
    """Run the command and return its exit code.

    `click.Group.main` would take any EPIPE for the end of the reader, and an interrupted prompt for its own.
    """
    if _COMPLETION_VARIABLE in os.environ:
        from casfs.cli.shell_completion import register_shells

        register_shells()
        casfs.main(args=arguments, prog_name="casfs", complete_var=_COMPLETION_VARIABLE)
    try:
        with casfs.make_context("casfs", list(arguments), obj=settings) as context:
            code = casfs.invoke(context)
    except click.exceptions.Exit as error:
        return error.exit_code
    return code if isinstance(code, int) else 0


def _os_error_message(error: OSError) -> str:
    """Return the system's message with the file name, which may be bytes, escaped for display."""
    message = error.strerror or str(error)
    if error.errno == errno.EAGAIN:
        # From a fork: no descriptor of casfs is non-blocking where it waits.
        message = f"{message}: {_PROCESS_LIMIT}"
    name = error.filename
    if isinstance(name, bytes):
        return f"{escape_path(name)}: {message}"
    return f"{name}: {message}" if name is not None else message


def _output_failed(as_json: bool, error: OSError) -> int:
    """Return the exit code for output that could not be written; report any error but a closed pipe."""
    if isinstance(error, BrokenPipeError):
        return EXIT_NO_READER
    Output(as_json).warn(f"the result cannot be printed: {_os_error_message(error)}")
    return EXIT_FAILED


def _keeps_code(error: OSError) -> tuple[str, ...]:
    """Return the verbs whose exit code 0 is kept where their output cannot be written.

    The exit code of a run is that of its steps. Exit code 1 would mean that a backup published nothing.
    """
    return ("run",) if isinstance(error, BrokenPipeError) else ("run", "backup")


def _fail(as_json: bool, message: str, code: int) -> int:
    standard_streams.keep_working()
    output = Output(as_json)
    output.warn(message)
    output.emit("error", message=message, exit=code)
    sys.stdout.flush()
    return code


class _LogHandler(logging.StreamHandler[TextIO]):
    """A handler that clears the line of progress before a record."""

    def emit(self, record: logging.LogRecord) -> None:
        with terminal_line.lock:
            terminal_line.clear()
            super().emit(record)


class _SingleLineFormatter(logging.Formatter):
    """A formatter that keeps each record on one line, so that a file name cannot forge a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return single_line(super().formatMessage(record))


def _configure() -> None:
    handler = _LogHandler()
    handler.setFormatter(_SingleLineFormatter("casfs: %(message)s"))
    for name in ("casfs", "casfs_mount"):
        logging.getLogger(name).addHandler(handler)
    _allow_open_files()
    _forbid_core_dumps()
    interruption.on_signal(INTERRUPTED.set)


def _allow_open_files() -> None:
    """Raise the limit of open files: a mount keeps packs open, and a restore directories."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _OPEN_FILES:
        return
    if hard == resource.RLIM_INFINITY or hard >= _OPEN_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, hard))
        return
    try:
        # Root may raise the hard limit too, except in some containers.
        resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    except (OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _forbid_core_dumps() -> None:
    """Write no core dump: it would contain keys and passphrases."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
