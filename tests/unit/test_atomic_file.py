"""A file is replaced as a whole or not at all, and nothing is left beside it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from casfs.atomic_file import replace_file


def test_replacing_a_file_changes_its_content_and_sets_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for mode, data in ((0o600, b"old"), (0o644, b"new")):
        replace_file(file, data, mode=mode, durable=True)
        assert file.read_bytes() == data
        assert stat.S_IMODE(file.stat().st_mode) == mode
    assert os.listdir(tmp_path) == ["file"]


def test_replacing_a_file_follows_no_link(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_bytes(b"precious")
    link.symlink_to(victim)
    replace_file(link, b"new")
    assert victim.read_bytes() == b"precious"
    assert not link.is_symlink() and link.read_bytes() == b"new"


def test_a_file_that_cannot_be_replaced_stays_and_leaves_no_unfinished_file(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_file(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]
