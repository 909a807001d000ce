"""Names of files in log records, which the system log must not get: other users may read it."""

from __future__ import annotations

import logging

_HIDDEN = "a file"


class LoggedName(str):
    """A name of a file as an argument of a log record; the system log shows `a file` instead."""


class NamelessFormatter(logging.Formatter):
    """A formatter that leaves out the names of files, and tracebacks, which may quote them."""

    def format(self, record: logging.LogRecord) -> str:
        args = record.args
        if isinstance(args, tuple):
            args = tuple(_HIDDEN if isinstance(one, LoggedName) else one for one in args)
        shown = logging.makeLogRecord(
            {
                **record.__dict__,
                "args": args,
                "exc_info": None,
                "exc_text": None,
                "stack_info": None,
            }
        )
        return super().format(shown)
