"""The commands copy, rewrite and recompress."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import Casfs


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "file").write_bytes(b"content" * 1000)
    (folder / "secret").write_bytes(b"secret" * 1000)
    return folder


def test_a_copy_in_an_encrypted_repository_restores_the_same(
    repository: Casfs, source: Path, tmp_path: Path
) -> None:
    repository.run("backup", source)
    (tmp_path / "passphrase").write_bytes(b"secret")
    keys = ("--passphrase-file", tmp_path / "passphrase")
    other = repository.beside("other")
    other.run("init", "--passphrase", *keys)
    copied = repository.json("copy", "all", "--to", other.where).one("copied")
    assert copied["was_there"] is False
    other.run("restore", "latest", "--target", tmp_path / "target", *keys)
    restored = tmp_path / "target" / str(source).lstrip("/")
    assert (restored / "file").read_bytes() == b"content" * 1000
    assert "no damage" in other.run("check", "--read-data", *keys).text


def test_a_copy_into_the_repository_itself_is_refused(repository: Casfs, source: Path) -> None:
    repository.run("backup", source)
    repository.refuses("copy", "latest", "--to", repository.where, mentions=["itself"], expect=2)


def test_a_rewrite_leaves_the_path_out_and_keeps_the_rest(
    repository: Casfs, source: Path, tmp_path: Path
) -> None:
    repository.run("backup", source)
    before = repository.run("snapshots", "--json").objects
    dry = repository.run("rewrite", "all", "--exclude", "secret", "--dry-run").text
    assert "would leave out" in dry and "secret" in dry
    assert repository.run("snapshots", "--json").objects == before
    repository.run("rewrite", "all", "--exclude", "secret")
    listed = repository.run("ls", "-R", "latest").text
    assert "secret" not in listed and "file" in listed
    assert "no damage" in repository.run("check", "--read-data").text


def test_a_rewrite_without_a_match_changes_nothing_and_exits_1(
    repository: Casfs, source: Path
) -> None:
    repository.run("backup", source)
    before = repository.run("snapshots", "--json").objects
    repository.run("rewrite", "all", "--exclude", "nothing-like-it", expect=1)
    assert repository.run("snapshots", "--json").objects == before


def test_recompress_keeps_every_byte(repository: Casfs, source: Path, tmp_path: Path) -> None:
    repository.run("backup", source)
    repository.run("recompress", "--compression", "19")
    assert "no damage" in repository.run("check", "--read-data").text
    restored = repository.run("dump", f"latest:{source}/file").out
    assert restored == b"content" * 1000
