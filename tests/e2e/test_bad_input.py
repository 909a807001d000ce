"""Bad input gets a clear sentence and the right exit code, and nothing is lost."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.support.cli import WITHOUT_READING_EVERYTHING, Casfs
from tests.support.mounts import is_mounted, mounted, tmpfs
from tests.support.stored_objects import StoredObjects

MIB = 1 << 20

# The verbs that work on a repository, with arguments that are right for each.
VERBS: tuple[tuple[str, ...], ...] = (
    ("backup", "."),
    ("snapshots",),
    ("ls", "latest"),
    ("find", "*"),
    ("diff", "latest", "latest"),
    ("dump", "latest:/"),
    ("log", "latest:/"),
    ("mount", "latest", "mountpoint"),
    ("restore", "latest", "--target", "target"),
    ("check",),
    ("stats",),
    ("tag", "latest", "--add", "word"),
)


@pytest.fixture(params=VERBS, ids=lambda verb: verb[0])
def verb(request: pytest.FixtureRequest, casfs: Casfs) -> tuple[str, ...]:
    (casfs.home / "mountpoint").mkdir()
    arguments: tuple[str, ...] = request.param
    return arguments


class TestInvalidRepository:
    def test_a_missing_repository_is_refused(self, casfs: Casfs, verb: tuple[str, ...]) -> None:
        casfs.refuses(*verb, mentions=["repository", casfs.where])
        assert casfs.repository is None or not casfs.repository.exists()

    def test_a_command_without_a_repository_is_a_usage_error(
        self, casfs: Casfs, verb: tuple[str, ...]
    ) -> None:
        casfs.at(None).refuses(*verb, expect=2, mentions=["CASFS_REPOSITORY"])

    def test_a_directory_that_is_no_repository_is_refused(
        self, casfs: Casfs, verb: tuple[str, ...]
    ) -> None:
        objects = StoredObjects(casfs)
        objects.write("config", b"[core]\n\tbare = false\n")
        casfs.refuses(*verb, mentions=[casfs.where])
        assert objects.names() == ["config"]
        assert objects.read("config") == b"[core]\n\tbare = false\n"

    def test_a_file_in_place_of_a_repository_is_refused(
        self, casfs: Casfs, verb: tuple[str, ...]
    ) -> None:
        assert casfs.repository is not None
        casfs.repository.write_bytes(b"not a directory")
        casfs.refuses(*verb, mentions=[str(casfs.repository)])
        assert casfs.repository.read_bytes() == b"not a directory"

    def test_a_repository_of_a_newer_format_is_refused(
        self, repository: Casfs, verb: tuple[str, ...]
    ) -> None:
        objects = StoredObjects(repository)
        first, _, rest = objects.read("config").partition(b"\n")
        assert first == b"casfs repository, format 2"
        newer = b"casfs repository, format 3\n" + rest
        objects.write("config", newer)
        repository.refuses(*verb, mentions=["format", "3", "newer"])
        assert objects.read("config") == newer

    @pytest.mark.parametrize("damage", ["empty", "garbage", "cut short"])
    def test_a_damaged_configuration_is_reported_in_one_line(
        self, repository: Casfs, damage: str
    ) -> None:
        objects = StoredObjects(repository)
        whole = objects.read("config")
        broken = {
            "empty": b"",
            "garbage": bytes(range(256)),
            "cut short": whole[: len(whole) // 2],
        }
        objects.write("config", broken[damage])
        result = repository.run("snapshots", expect=None)
        assert result.exit in (1, 5), result
        assert len(result.complaints) == 1, result
        assert "config" in result.complaint or "repository" in result.complaint, result

    def test_init_refuses_an_existing_repository(self, repository: Casfs, source: Path) -> None:
        snapshot = repository.backup(source)
        repository.refuses("init", mentions=[repository.where, "already"])
        assert repository.json("snapshots").one("snapshot")["id"] == snapshot["id"]

    def test_init_refuses_a_directory_with_other_content(self, casfs: Casfs) -> None:
        assert casfs.repository is not None
        casfs.repository.mkdir()
        (casfs.repository / "thesis.txt").write_bytes(b"years of work")
        casfs.refuses("init", mentions=[str(casfs.repository)])
        assert os.listdir(casfs.repository) == ["thesis.txt"]

    def test_init_refuses_a_path_below_a_file(self, casfs: Casfs, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        casfs.at(tmp_path / "file" / "repository").refuses(
            "init", mentions=[str(tmp_path / "file")]
        )


class TestInvalidSource:
    def test_a_missing_source_is_refused(self, repository: Casfs, tmp_path: Path) -> None:
        repository.refuses("backup", tmp_path / "nowhere", mentions=[str(tmp_path / "nowhere")])
        assert repository.json("snapshots").objects == []

    def test_a_source_below_an_unsearchable_directory_is_reported_as_denied(
        self, repository: Casfs, source: Path
    ) -> None:
        """The source may exist, so the message does not claim that it is missing."""
        (source / "documents").chmod(0)
        sentence = repository.refuses(
            "backup",
            source / "documents/report.txt",
            mentions=["permission denied", "nothing was published"],
            prefix=WITHOUT_READING_EVERYTHING,
        )
        assert "exist" not in sentence
        assert repository.json("snapshots").objects == []

    def test_a_missing_source_beside_an_existing_one_exits_with_3(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        result = repository.run("backup", source, tmp_path / "nowhere", expect=3)
        assert str(tmp_path / "nowhere") in result.complaint
        published = repository.json("snapshots").one("snapshot")
        assert published["files"] == 4
        assert published["paths"] == [str(source)]

    def test_a_source_that_was_missing_once_costs_no_reading_of_the_others(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        other = tmp_path / "other"
        other.mkdir()
        (other / "file").write_text("content")
        moved = tmp_path / "moved"
        whole = repository.json("backup", source, other).one("snapshot")
        other.rename(moved)
        for _ in range(2):
            partial = repository.json("backup", source, other, expect=3).one("snapshot")
            assert (partial["unchanged"], partial["paths"]) == (4, [str(source)])
        moved.rename(other)
        again = repository.json("backup", source, other).one("snapshot")
        assert (again["parent"], again["unchanged"]) == (whole["id"], 5)
        assert again["paths"] == whole["paths"] == sorted([str(source), str(other)])

    def test_an_unreadable_file_in_a_source_exits_with_3(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        secret = source / "documents" / "secret"
        secret.write_bytes(b"nobody reads this")
        secret.chmod(0)
        where = WITHOUT_READING_EVERYTHING
        plain = repository.run("backup", source, expect=3, prefix=where)
        assert str(secret) in plain.complaint
        assert "permission denied" in plain.complaint.lower()
        reported = repository.json("backup", source, expect=3, prefix=where)
        (problem,) = reported.of_type("problem")
        assert problem["path"].endswith("documents/secret")
        assert problem["kind"] == "unreadable"
        assert "ermission denied" in problem["message"]
        snapshot = reported.one("snapshot")
        assert (snapshot["unreadable"], snapshot["files"]) == (1, 4)
        repository.run("restore", "latest", "--target", tmp_path / "target")
        secret.unlink()
        restored = tmp_path / "target" / str(source).lstrip("/")
        assert not (restored / "documents" / "secret").exists()
        assert (restored / "documents" / "report.txt").read_bytes() == b"a report\n" * 1000

    def test_an_unreadable_directory_in_a_source_exits_with_3(
        self, repository: Casfs, source: Path
    ) -> None:
        closed = source / "closed"
        closed.mkdir()
        (closed / "inside").write_bytes(b"out of reach")
        closed.chmod(0)
        reported = repository.json("backup", source, expect=3, prefix=WITHOUT_READING_EVERYTHING)
        (problem,) = reported.of_type("problem")
        assert problem["path"].rstrip("/").endswith("closed")
        assert problem["kind"] == "unreadable"
        snapshot = reported.one("snapshot")
        assert (snapshot["unreadable"], snapshot["files"]) == (1, 4)
        closed.chmod(0o700)

    def test_an_unreadable_source_directory_is_reported(
        self, repository: Casfs, source: Path
    ) -> None:
        source.chmod(0)
        result = repository.run("backup", source, expect=None, prefix=WITHOUT_READING_EVERYTHING)
        source.chmod(0o755)
        assert result.exit in (1, 3), result
        assert str(source) in result.complaint

    @pytest.mark.fuse
    def test_a_read_error_in_the_middle_of_a_file_is_reported(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        """A damaged repository, mounted, is a disk that fails where the damage is."""
        broken = repository.beside("broken").init()
        (source / "big").write_bytes(random.Random(3).randbytes(24 * MIB))
        broken.backup(source)
        objects = StoredObjects(broken)
        pack = objects.largest_pack()
        objects.flip(pack.name, pack.size // 2)
        with mounted(broken, "latest", at=tmp_path / "disk") as disk:
            reported = repository.json("backup", disk, expect=3)
        (problem,) = reported.of_type("problem")
        assert problem["path"].endswith("/big")
        assert problem["kind"] == "unreadable"
        assert reported.one("snapshot")["files"] == 4

    def test_a_source_may_be_a_single_file(self, repository: Casfs, source: Path) -> None:
        snapshot = repository.backup(source / "readme.txt")
        assert (snapshot["files"], snapshot["bytes"]) == (1, 8)
        path = f"latest:{source / 'readme.txt'}"
        assert repository.run("dump", path).out == b"read me\n"

    def test_a_source_given_twice_is_stored_once(self, repository: Casfs, source: Path) -> None:
        snapshot = repository.backup(source, source)
        assert snapshot["files"] == 4

    def test_a_repository_inside_a_source_is_left_out_and_reported(
        self, casfs: Casfs, source: Path
    ) -> None:
        inside = casfs.at(source / "documents" / "backups").init()
        inside.backup(source)
        result = inside.run("backup", source)
        assert str(source / "documents" / "backups") in result.complaint
        paths = [node["path"] for node in inside.json("ls", "latest").of_type("node")]
        assert any(path.endswith("documents/report.txt") for path in paths)
        assert not any("backups/" in path for path in paths)
        assert inside.json("check", "--read-data").one("summary")["ok"] is True

    def test_a_repository_as_its_own_source_is_refused(self, repository: Casfs) -> None:
        assert repository.repository is not None
        result = repository.run("backup", repository.repository, expect=None)
        assert result.exit in (1, 2), result
        assert str(repository.repository) in result.complaint
        assert repository.json("snapshots").objects == []


class TestInvalidSnapshot:
    NAMERS: tuple[tuple[str, ...], ...] = (
        ("ls", "{}"),
        ("diff", "{}", "latest"),
        ("diff", "latest", "{}"),
        ("dump", "{}:/"),
        ("log", "{}:/"),
        ("mount", "{}", "mountpoint"),
        ("restore", "{}", "--target", "target"),
        ("tag", "{}", "--add", "word"),
    )

    @pytest.mark.parametrize("verb", NAMERS, ids=" ".join)
    def test_an_unknown_snapshot_is_refused(
        self, repository: Casfs, source: Path, verb: tuple[str, ...]
    ) -> None:
        (repository.home / "mountpoint").mkdir()
        snapshot = repository.backup(source)["id"]
        unknown = "".join("0" if digit != "0" else "1" for digit in snapshot[:12])
        repository.refuses(*(part.format(unknown) for part in verb), mentions=[unknown])
        assert not (repository.home / "target").exists()

    def test_text_that_is_no_snapshot_id_is_refused(self, repository: Casfs, source: Path) -> None:
        repository.backup(source)
        for name in ("yesterday", "../../etc", "xyz", "ABCDEFG", "latest~1"):
            repository.refuses("ls", name, mentions=[name])

    def test_an_empty_snapshot_name_is_refused(self, repository: Casfs, source: Path) -> None:
        repository.backup(source)
        result = repository.run("ls", "", expect=None)
        assert result.exit in (1, 2), result
        assert result.complaints

    def test_latest_without_snapshots_is_refused(self, repository: Casfs) -> None:
        repository.refuses("ls", "latest", mentions=["snapshot"])

    def test_an_ambiguous_snapshot_prefix_is_refused(
        self, repository: Casfs, tmp_path: Path
    ) -> None:
        """Of seventeen ids two begin with the same of sixteen digits."""
        (tmp_path / "small").mkdir()
        found: dict[str, str] = {}
        while True:
            snapshot = repository.backup(tmp_path / "small")["id"]
            if snapshot[0] in found:
                break
            found[snapshot[0]] = snapshot
        (repository.home / "mountpoint").mkdir()
        for verb in self.NAMERS:
            repository.refuses(*(part.format(snapshot[0]) for part in verb), mentions=["ambiguous"])
        assert repository.json("ls", snapshot[:32]).of_type("node")

    def test_a_missing_path_in_a_snapshot_is_refused(self, repository: Casfs, source: Path) -> None:
        repository.backup(source)
        for verb in (
            ("ls", "latest:/no/such/path"),
            ("dump", "latest:/no/such/path"),
            ("log", "latest:/no/such/path"),
            ("restore", "latest:/no/such/path", "--target", "target"),
        ):
            repository.refuses(*verb, mentions=["no/such/path"])

    def test_a_path_below_a_file_in_a_snapshot_is_refused(
        self, repository: Casfs, source: Path
    ) -> None:
        repository.backup(source)
        repository.refuses("ls", f"latest:{source}/readme.txt/below", mentions=["readme.txt"])


class TestInvalidMountpoint:
    @pytest.fixture(autouse=True)
    def snapshot(self, repository: Casfs, source: Path) -> str:
        identity = repository.backup(source)["id"]
        assert isinstance(identity, str)
        return identity

    @pytest.mark.fuse
    def test_a_missing_mountpoint_is_refused(self, repository: Casfs, tmp_path: Path) -> None:
        at = tmp_path / "nowhere"
        repository.refuses("mount", "latest", at, mentions=[str(at)])
        assert not at.exists()

    @pytest.mark.fuse
    def test_a_mountpoint_that_is_a_file_is_refused(
        self, repository: Casfs, tmp_path: Path
    ) -> None:
        at = tmp_path / "file"
        at.touch()
        repository.refuses("mount", "latest", at, mentions=[str(at), "director"])

    @pytest.mark.fuse
    def test_a_mountpoint_with_a_casfs_mount_is_refused(
        self, repository: Casfs, tmp_path: Path
    ) -> None:
        with mounted(repository, "latest", at=tmp_path / "mount") as at:
            repository.refuses("mount", "latest", at, mentions=[str(at), "mounted"])
            repository.refuses("mount", at, mentions=[str(at), "mounted"])
            assert os.listdir(at)

    @pytest.mark.fuse
    def test_a_mountpoint_with_another_file_system_is_refused(
        self, repository: Casfs, tmp_path: Path, superuser: None
    ) -> None:
        with tmpfs(tmp_path / "other") as at:
            (at / "file").write_bytes(b"kept")
            repository.refuses("mount", "latest", at, mentions=[str(at), "mounted"])
            assert (at / "file").read_bytes() == b"kept"

    @pytest.mark.fuse
    def test_a_mountpoint_inside_the_repository_is_refused(self, repository: Casfs) -> None:
        assert repository.repository is not None
        for at in (repository.repository, repository.repository / "here"):
            at.mkdir(exist_ok=True)
            repository.refuses("mount", "latest", at, mentions=["repository"])
            assert not is_mounted(at)

    @pytest.mark.fuse
    def test_a_mountpoint_inside_the_repository_behind_a_symlink_is_refused(
        self, repository: Casfs, tmp_path: Path
    ) -> None:
        assert repository.repository is not None
        (repository.repository / "here").mkdir()
        (tmp_path / "link").symlink_to(repository.repository / "here")
        repository.refuses("mount", "latest", tmp_path / "link", mentions=["repository"])
        assert not is_mounted(repository.repository / "here")

    @pytest.mark.fuse
    def test_umount_refuses_a_path_without_a_mount(self, repository: Casfs, tmp_path: Path) -> None:
        (tmp_path / "plain").mkdir()
        for at in (tmp_path / "plain", tmp_path / "nowhere"):
            repository.refuses("umount", at, mentions=[str(at)])

    @pytest.mark.fuse
    def test_umount_refuses_a_mount_of_another_program(
        self, repository: Casfs, tmp_path: Path, superuser: None
    ) -> None:
        with tmpfs(tmp_path / "other") as at:
            repository.refuses("umount", at, mentions=[str(at)])
            assert is_mounted(at)

    @pytest.mark.fuse
    def test_umount_of_a_busy_mount_is_refused(self, repository: Casfs, tmp_path: Path) -> None:
        with mounted(repository, "latest", at=tmp_path / "mount") as at:
            handle = os.open(at, os.O_RDONLY)
            try:
                repository.refuses("umount", at, mentions=[str(at), "busy"])
                assert is_mounted(at)
            finally:
                os.close(handle)
