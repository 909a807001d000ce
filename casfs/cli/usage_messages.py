"""Messages about wrong arguments in the words of casfs: click's own sentences follow another style."""

from __future__ import annotations

import re
from collections.abc import Callable

import click

_REWRITES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"No such command '(.*)'", lambda found: f"there is no command {found[1]}"),
    (r"Missing command", lambda _: "a command is missing"),
    (r"Option '(.*)' requires an argument", lambda found: f"{found[1]} needs a value"),
    (
        r"Option '(.*)' requires (\d+) arguments",
        lambda found: f"{found[1]} needs {found[2]} values",
    ),
    (r"Option '(.*)' does not take a value", lambda found: f"{found[1]} takes no value"),
    (
        r"Got unexpected extra argument \((.*)\)",
        lambda found: f"{found[1]} is one argument too many",
    ),
    (
        r"Got unexpected extra arguments \((.*)\)",
        lambda found: f"{found[1]} are too many arguments",
    ),
    (r"'(.*)' is not (?:one of )?((?:'[^']*'(?:, )?)+)", lambda found: _choice(found[1], found[2])),
    (
        r"'(.*)' is not a valid integer(?: range)?",
        lambda found: f"{found[1]} is not a whole number",
    ),
    (r"'(.*)' is not a valid float(?: range)?", lambda found: f"{found[1]} is not a number"),
    (r"(.*) is not in the range (.*)", lambda found: f"{found[1]} is not {_range(found[2])}"),
    (
        r"(?:File|Directory|Path) '(.*)' (does not exist|is a file|is a directory)",
        lambda found: f"{found[1]} {found[2]}",
    ),
    (
        r"(?:File|Directory|Path) '(.*)' is not (readable|writable|executable)",
        lambda found: f"{found[1]} is not {found[2]}",
    ),
)


def usage_message(error: click.UsageError) -> str:
    """Return the message of a usage error as one sentence without a full stop."""
    if isinstance(error, click.MissingParameter):
        return f"{_parameter(error)} is missing"
    if isinstance(error, click.NoSuchOption):
        close = f"; did you mean {' or '.join(error.possibilities)}?" if error.possibilities else ""
        return f"there is no option {error.option_name}{close}"
    sentence = _rewrite(error.message.rstrip("."))
    return f"{_parameter(error)}: {sentence}" if isinstance(error, click.BadParameter) else sentence


def _parameter(error: click.BadParameter) -> str:
    """Return the name of an option or argument as it is typed."""
    parameter = error.param
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len)
    if parameter is not None:
        return parameter.human_readable_name
    return str(error.param_hint or "an argument")


def _rewrite(message: str) -> str:
    for pattern, replace in _REWRITES:
        found = re.fullmatch(pattern, message, re.DOTALL)
        if found is not None:
            return replace(found)
    return message


def _choice(value: str, quoted: str) -> str:
    *most, last = [choice.strip("' ") for choice in quoted.split(",")]
    choices = f"{', '.join(most)} or {last}" if most else last
    return f"{value} is unknown; use {choices}"


def _range(bounds: str) -> str:
    """Return click's `1<=x<=100` in words."""
    between = re.fullmatch(r"(.*)<=x<=(.*)", bounds)
    if between is not None:
        return f"between {between[1]} and {between[2]}"
    one_sided = re.fullmatch(r"x(<=|>=|<|>)(.*)", bounds)
    words = {"<=": "at most", ">=": "at least", "<": "less than", ">": "more than"}
    return f"{words[one_sided[1]]} {one_sided[2]}" if one_sided is not None else f"in {bounds}"
