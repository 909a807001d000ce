"""A restore never writes outside its target, through a symbolic link or otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.cli import Casfs
from tests.support.comparing import Look, look_at


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What must stay as it is, to the nanosecond."""
    folder = tmp_path / "outside"
    (folder / "letters").mkdir(parents=True)
    (folder / "report.txt").write_bytes(b"precious")
    (folder / "letters" / "to-anna.txt").write_bytes(b"precious too")
    os.chmod(folder, 0o710)
    os.setxattr(folder, "user.mark", b"mine")
    for path in (folder / "letters/to-anna.txt", folder / "report.txt", folder / "letters", folder):
        os.utime(path, ns=(10**18, 10**18 + 1))
    return folder


@pytest.fixture
def untouched(outside: Path) -> dict[bytes, Look]:
    return look_at(outside)


@pytest.fixture
def kept(repository: Casfs, source: Path, tmp_path: Path) -> Casfs:
    (source / "documents").chmod(0o755)
    os.setxattr(source / "documents", "user.mark", b"from the snapshot")
    repository.backup("source", cwd=tmp_path)
    return repository


@pytest.mark.parametrize("overwrite", ["always", "if-changed", "never"])
@pytest.mark.parametrize("delete", [(), ("--delete",)], ids=["", "delete"])
@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "relative"])
def test_a_parent_that_is_a_link_to_outside_is_not_followed(
    kept: Casfs,
    outside: Path,
    untouched: dict[bytes, Look],
    tmp_path: Path,
    overwrite: str,
    delete: tuple[str, ...],
    absolute: bool,
) -> None:
    tree = tmp_path / "target" / "source"
    tree.mkdir(parents=True)
    (tree / "documents").symlink_to(outside if absolute else "../../outside")
    result = kept.run(
        *("restore", "latest", "--target", tmp_path / "target"),
        *("--overwrite", overwrite, *delete),
        expect=None,
    )
    assert look_at(outside) == untouched, result
    if result.exit == 0 and overwrite != "never":
        assert not (tree / "documents").is_symlink()
        assert (tree / "documents/report.txt").read_bytes() == b"a report\n" * 1000
    else:
        assert "documents" in result.complaint or result.exit == 0, result


def test_a_link_further_up_is_not_followed(
    kept: Casfs, outside: Path, untouched: dict[bytes, Look], tmp_path: Path
) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "source").symlink_to(outside)
    kept.run("restore", "latest", "--target", tmp_path / "target", expect=None)
    assert look_at(outside) == untouched


def test_a_part_of_a_snapshot_does_not_follow_links_below_the_target(
    kept: Casfs, outside: Path, untouched: dict[bytes, Look], tmp_path: Path
) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "letters").symlink_to(outside / "letters")
    kept.run("restore", "latest:source/documents", "--target", tmp_path / "target", expect=None)
    assert look_at(outside) == untouched


def test_a_target_that_is_a_link_is_the_users_own_choice(
    kept: Casfs, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "target").symlink_to("real")
    kept.run("restore", "latest", "--target", tmp_path / "target")
    assert (tmp_path / "real/source/readme.txt").read_bytes() == b"read me\n"
    assert (tmp_path / "target").is_symlink()


@pytest.mark.parametrize("overwrite", ["always", "if-changed", "never"])
@pytest.mark.parametrize("dangling", [False, True], ids=["to a file", "dangling"])
def test_a_file_that_is_a_link_is_replaced_and_not_written_through(
    kept: Casfs,
    outside: Path,
    untouched: dict[bytes, Look],
    tmp_path: Path,
    overwrite: str,
    dangling: bool,
) -> None:
    tree = tmp_path / "target" / "source"
    tree.mkdir(parents=True)
    victim = outside / ("not there" if dangling else "report.txt")
    (tree / "readme.txt").symlink_to(victim)
    kept.run("restore", "latest", "--target", tmp_path / "target", "--overwrite", overwrite)
    assert look_at(outside) == untouched
    if overwrite == "never":
        assert (tree / "readme.txt").is_symlink()
    else:
        assert not (tree / "readme.txt").is_symlink()
        assert (tree / "readme.txt").read_bytes() == b"read me\n"


@pytest.mark.parametrize("overwrite", ["always", "if-changed"])
def test_a_file_with_another_name_outside_is_replaced_and_not_written_into(
    kept: Casfs, outside: Path, tmp_path: Path, overwrite: str
) -> None:
    tree = tmp_path / "target" / "source"
    tree.mkdir(parents=True)
    os.link(outside / "report.txt", tree / "readme.txt")
    before = (outside / "report.txt").stat()
    kept.run("restore", "latest", "--target", tmp_path / "target", "--overwrite", overwrite)
    after = (outside / "report.txt").stat()
    assert (outside / "report.txt").read_bytes() == b"precious"
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert (tree / "readme.txt").read_bytes() == b"read me\n"


def test_delete_removes_a_link_and_not_what_it_points_to(
    kept: Casfs, outside: Path, untouched: dict[bytes, Look], tmp_path: Path
) -> None:
    tree = tmp_path / "target" / "source"
    tree.mkdir(parents=True)
    (tree / "extra").symlink_to(outside)
    (tree / "extra directory").mkdir()
    (tree / "extra directory" / "link").symlink_to(outside)
    kept.run("restore", "latest", "--target", tmp_path / "target", "--delete")
    assert look_at(outside) == untouched
    assert not os.path.lexists(tree / "extra")
    assert not os.path.lexists(tree / "extra directory")


def test_a_link_of_one_snapshot_is_not_followed_by_the_next_restore(
    repository: Casfs,
    source: Path,
    outside: Path,
    untouched: dict[bytes, Look],
    tmp_path: Path,
) -> None:
    (source / "place").symlink_to(outside)
    first = repository.backup("source", cwd=tmp_path)["id"]
    (source / "place").unlink()
    (source / "place").mkdir()
    (source / "place" / "report.txt").write_bytes(b"would overwrite")
    second = repository.backup("source", cwd=tmp_path)["id"]
    for identity in (first, second):
        repository.run("restore", identity, "--target", tmp_path / "target")
        assert look_at(outside) == untouched
    assert (tmp_path / "target/source/place/report.txt").read_bytes() == b"would overwrite"
    repository.run("restore", first, "--target", tmp_path / "target", "--delete")
    assert look_at(outside) == untouched
    assert (tmp_path / "target/source/place").is_symlink()


def test_metadata_of_links_is_not_given_to_what_they_point_to(
    repository: Casfs,
    source: Path,
    outside: Path,
    untouched: dict[bytes, Look],
    tmp_path: Path,
) -> None:
    (source / "place").symlink_to(outside)
    os.utime(source / "place", ns=(5 * 10**17, 5 * 10**17), follow_symlinks=False)
    repository.backup("source", cwd=tmp_path)
    repository.run("restore", "latest", "--target", tmp_path / "target")
    assert look_at(outside) == untouched
    assert os.lstat(tmp_path / "target/source/place").st_mtime_ns == 5 * 10**17


def test_hard_links_are_not_made_to_a_file_outside(
    repository: Casfs, source: Path, outside: Path, tmp_path: Path
) -> None:
    """The first name of a group lies behind a link to outside where a file of that name is."""
    (source / "documents" / "also.txt").write_bytes(b"linked")
    os.link(source / "documents" / "also.txt", source / "second.txt")
    (outside / "also.txt").write_bytes(b"secret")
    repository.backup("source", cwd=tmp_path)
    tree = tmp_path / "target" / "source"
    tree.mkdir(parents=True)
    (tree / "documents").symlink_to(outside)
    for overwrite in ("never", "if-changed"):
        repository.run(
            *("restore", "latest", "--target", tmp_path / "target", "--overwrite", overwrite),
            expect=None,
        )
        assert (outside / "also.txt").stat().st_nlink == 1
        assert (outside / "also.txt").read_bytes() == b"secret"
        if (tree / "second.txt").exists():
            assert (tree / "second.txt").read_bytes() == b"linked"
