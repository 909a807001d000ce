"""Whole screens of a real terminal, of two widths, beside those that the documentation shows."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.cli import program
from tests.support.terminal_pictures import PAGE, Picture, read_page, screen

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="it needs a folder /srv of its own"),
    pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux"),
]

PICTURES = read_page(PAGE.read_text("utf-8"))


def test_the_page_shows_the_everyday_commands_at_two_widths() -> None:
    assert sorted(PICTURES) == [80, 120]
    for pictures in PICTURES.values():
        typed = {command.split()[1] for picture in pictures for command in picture.commands}
        everyday = {
            "backup",
            "snapshots",
            "ls",
            "find",
            "diff",
            "check",
            "restore",
            "stats",
            "forget",
        }
        assert everyday | {"--help"} <= typed


@pytest.mark.parametrize("columns", [80, 120])
def test_the_terminal_shows_what_the_documentation_shows(columns: int, tmp_path: Path) -> None:
    with screen(tmp_path, program()[0], columns) as opened:
        for shown in PICTURES[columns]:
            taken, is_coloured = opened.picture(shown)
            assert taken.masked == shown.masked
            assert not is_coloured
            assert all(len(line) <= columns for line in taken.lines)


@pytest.mark.parametrize(
    "more", [{"NO_COLOR": "1"}, {"CLICOLOR_FORCE": "1"}, {"COLORTERM": "truecolor"}]
)
def test_variables_about_colours_change_nothing(more: dict[str, str], tmp_path: Path) -> None:
    with screen(tmp_path, program()[0], 80, more) as opened:
        for shown in PICTURES[80][:3]:
            taken, is_coloured = opened.picture(shown)
            assert (taken.masked, is_coloured) == (shown.masked, False)


def test_the_mask_keeps_widths_and_hides_only_what_differs_each_time() -> None:
    line = "a23a9b84cf10  2026-11-28 07:12:46  desk  letters  daily  731.4 KiB  9 files"
    (masked,) = Picture((line,)).masked
    assert masked == "000000000000  0000-00-00 00:00:00  desk  letters  daily  000.0 KiB  9 files"
