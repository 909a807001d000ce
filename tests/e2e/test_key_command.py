"""Recipients as arguments of the command key, and the questions for a passphrase."""

from __future__ import annotations

from pathlib import Path

from tests.support.cli import Casfs
from tests.support.encryption import OTHER_PUBLIC, PUBLIC
from tests.support.key_tools import at_a_terminal


def recipients_of(casfs: Casfs) -> list[tuple[str, str]]:
    return [
        (one["kind"], one["recipient"]) for one in casfs.json("key", "list").of_type("recipient")
    ]


def test_key_add_takes_recipients_as_arguments_and_as_options(casfs: Casfs) -> None:
    casfs.run("init", "--recipient", PUBLIC)
    casfs.run("key", "add", OTHER_PUBLIC)
    assert [value for _, value in recipients_of(casfs)] == [PUBLIC, OTHER_PUBLIC]
    casfs.run("key", "remove", OTHER_PUBLIC[:20])
    casfs.run("key", "add", "--recipient", OTHER_PUBLIC)
    assert len(recipients_of(casfs)) == 2


def test_key_remove_takes_the_word_passphrase(casfs: Casfs, tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    file.write_text("correct horse\n")
    casfs.run("init", "--recipient", PUBLIC, "--passphrase-file", file)
    assert [kind for kind, _ in recipients_of(casfs)] == ["age", "passphrase"]
    casfs.run("key", "remove", "passphrase")
    assert recipients_of(casfs) == [("age", PUBLIC)]
    casfs.refuses("key", "remove", "passphrase", expect=2, mentions=["casfs key list"])


def test_a_wrong_passphrase_is_asked_for_again(casfs: Casfs, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    file.write_text("correct horse\n")
    casfs.run("init", "--passphrase-file", file)
    casfs.run("backup", source)
    answers = ["wrong", "wrong too", "correct horse"]
    shown = at_a_terminal(casfs, "ls", "latest", answers=answers).complaint
    assert shown.count("wrong; try again") == 2
    shown = at_a_terminal(casfs, "ls", "latest", answers=["wrong"] * 3, expect=1).complaint
    assert "the passphrase is wrong" in shown
