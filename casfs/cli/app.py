"""The command `casfs`: the table of its commands, the shared options, exit codes and signals.

The module of a command is imported only when the command is used, so that `casfs version` starts
quickly and only `casfs mount` needs FUSE.
"""

from __future__ import annotations

import importlib
import logging
import os
import resource
import signal
import sys
from types import FrameType

import click

from casfs import __version__
from casfs.cli.examples import add_examples
from casfs.cli.output import Output
from casfs.cli.settings import Settings, common_options
from casfs.cli.verbs import SuggestingGroup
from casfs.display import escape_path, single_line
from casfs.errors import CasfsError

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
EXIT_INTERRUPTED = 130


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
        add_examples(command, cmd_name)
        return command


_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


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
@common_options
def casfs() -> None:
    """Back up files as verified, deduplicated snapshots; restore them or mount them as a file system."""


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code; only a bug leaves a traceback."""
    _open_standard_streams()
    _configure()
    if _COMPLETION_VARIABLE in os.environ:
        from casfs.cli.shell_completion import register_shells

        register_shells()
    as_json = "--json" in arguments
    try:
        settings = Settings()
        code = casfs.main(args=arguments, prog_name="casfs", standalone_mode=False, obj=settings)
        settings.report_requests()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except CasfsError as error:
        return _fail(as_json, str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return EXIT_USAGE
    except click.UsageError as error:
        hint = f" ({error.ctx.command_path} --help)" if error.ctx and error.ctx.parent else ""
        return _fail(as_json, error.format_message().rstrip(".") + hint, EXIT_USAGE)
    except click.ClickException as error:
        return _fail(as_json, error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail(
            as_json, "interrupted; the repository is as intact as before", EXIT_INTERRUPTED
        )
    except BrokenPipeError as error:
        return stdout_failed(error, EXIT_FAILED)
    except OSError as error:
        return _fail(as_json, _os_error_message(error), EXIT_FAILED)


def _os_error_message(error: OSError) -> str:
    """Return the system's message with the file name, which may be bytes, escaped for display."""
    message = error.strerror or str(error)
    name = error.filename
    if isinstance(name, bytes):
        return f"{escape_path(name)}: {message}"
    return f"{name}: {message}" if name is not None else message


def stdout_failed(error: OSError, code: int) -> int:
    """Send further output to the null device and return the exit code `code`.

    Call it when a write to standard output fails. A closed pipe is no error: its reader has exited. Any
    other error is printed to standard error.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if not isinstance(error, BrokenPipeError):
        Output(as_json=False).warn(f"the result cannot be printed: {_os_error_message(error)}")
    return code


def _fail(as_json: bool, message: str, code: int) -> int:
    output = Output(as_json)
    output.warn(message)
    try:
        output.emit("error", message=message, exit=code)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


class _SingleLineFormatter(logging.Formatter):
    """A formatter that keeps each record on one line, so that a file name cannot forge a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return single_line(super().formatMessage(record))


def _open_standard_streams() -> None:
    """Open the null device for each of stdin, stdout and stderr that the parent process closed.

    Otherwise a file of the repository would get that descriptor number: a read of stdin would read it,
    and any message would be written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # open(2) returns the lowest free number, which is this one.
            fd = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            os.set_inheritable(fd, True)
        if number and getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


def _configure() -> None:
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(_SingleLineFormatter("casfs: %(message)s"))
    for name in ("casfs", "casfs_mount"):
        logging.getLogger(name).addHandler(handler)
    _allow_open_files()
    _forbid_core_dumps()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _interrupt)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _allow_open_files() -> None:
    """Raise the limit of open files: a walk and a restore keep one directory of each level open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _forbid_core_dumps() -> None:
    """Write no core dump: it would contain keys and passphrases."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def _interrupt(number: int, frame: FrameType | None) -> None:
    from casfs.storage.interruption import INTERRUPTED

    INTERRUPTED.set()
    raise KeyboardInterrupt
