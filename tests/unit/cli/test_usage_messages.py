"""Sentences about wrong arguments: what click reports, in the words of casfs."""

from __future__ import annotations

import click
import pytest

from casfs.cli.app import VERBS, casfs
from casfs.cli.settings import Settings
from casfs.cli.usage_messages import usage_message


def message_of(*arguments: str) -> str:
    with (
        pytest.raises(click.UsageError) as caught,
        casfs.make_context("casfs", list(arguments), obj=Settings()) as context,
    ):
        casfs.invoke(context)
    return usage_message(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bakcup",), "there is no command bakcup; did you mean backup?"),
        (("ls", "latest", "--nope"), "there is no option --nope"),
        (("backup", "--attempts", "0", "."), "--attempts: 0 is not between 1 and 100"),
        (("backup", "--attempts", "few", "."), "--attempts: few is not a whole number"),
        (("backup", "--patience", "long", "."), "--patience: long is not a number"),
        (("backup", "--spool", "tape", "."), "--spool: tape is unknown; use memory or disk"),
        (("backup", "--tag"), "--tag needs a value"),
        (("ls", "--json=yes", "latest"), "--json takes no value"),
        (("ls",), "SNAP[:PATH] is missing"),
        (("restore", "latest"), "--target is missing"),
        (("tag", "latest", "surplus"), "surplus is one argument too many"),
        (("tag", "latest", "a", "b"), "a b are too many arguments"),
        (("completion", "tcl"), "SHELL: tcl is unknown; use bash, zsh or fish"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_usage_error_is_a_sentence_of_casfs(arguments: tuple[str, ...], message: str) -> None:
    assert message_of(*arguments) == message


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_no_verb_lets_a_sentence_of_click_through(verb: str) -> None:
    for arguments in ((verb, "--surely-not-there"), (verb, "--json=3")):
        message = message_of(*arguments)
        assert message[0] not in "'ENMGI", message
        assert not message.endswith("."), message
