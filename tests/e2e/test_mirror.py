"""The command mirror: a copy of a repository that is a repository."""

from __future__ import annotations

from pathlib import Path

from tests.support.cli import Casfs
from tests.support.stored_objects import StoredObjects


def test_a_mirror_restores_and_checks_like_the_repository(
    repository: Casfs, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"content" * 1000)
    repository.run("backup", source)
    copy = tmp_path / "copy"
    printed = repository.json("mirror", copy).one("mirror")
    assert (printed["copied"] > 0, printed["damage"]) == (True, 0)
    again = repository.json("mirror", copy).one("mirror")
    assert (again["copied"], again["present"]) == (0, printed["copied"])
    mirrored = Casfs(copy, repository.home)
    assert "no damage" in mirrored.run("check", "--read-data").text
    mirrored.run("restore", "latest", "--target", tmp_path / "target")
    restored = tmp_path / "target" / str(source).lstrip("/") / "file"
    assert restored.read_bytes() == b"content" * 1000


def test_a_mirror_into_the_repository_itself_is_refused(repository: Casfs, tmp_path: Path) -> None:
    assert repository.repository is not None
    for place in (
        repository.repository,
        repository.repository / "copy",
        repository.repository.parent,
    ):
        repository.refuses("mirror", place, mentions=["overlap"])
    assert not (repository.repository / "copy").exists()


def test_a_mirror_to_a_file_is_refused(repository: Casfs, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    repository.refuses("mirror", tmp_path / "file", mentions=["not a folder"])
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_mirror_into_a_folder_of_other_files_is_refused(
    repository: Casfs, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    repository.refuses("mirror", tmp_path / "photos", mentions=["photos", "not empty"])
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_a_mirror_continues_in_a_folder_that_has_locks_and_no_configuration(
    repository: Casfs, tmp_path: Path
) -> None:
    (tmp_path / "copy" / "locks").mkdir(parents=True)
    repository.run("mirror", tmp_path / "copy")
    Casfs(tmp_path / "copy", repository.home).run("check")


def test_a_mirror_with_a_damaged_pack_exits_5_and_names_it(
    repository: Casfs, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"content" * 1000)
    repository.run("backup", tmp_path / "file")
    objects = StoredObjects(repository)
    (pack,) = objects.data_packs()
    objects.flip(pack.name, 50)
    printed = repository.run("mirror", tmp_path / "copy", expect=5)
    assert pack.digest in printed.complaint and "not copied" in printed.complaint
