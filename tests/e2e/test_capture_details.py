"""What casfs knows about files and snapshots: in the mount, unlisted, and on the command line."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from blake3 import blake3

from tests.support.cli import Casfs
from tests.support.comparing import rsync_differences, tree_differences
from tests.support.mounts import mounted

MIB = 1 << 20


@pytest.mark.fuse
class TestCaptureDetailsInMount:
    def test_capture_state_and_digests_are_readable_and_unlisted_attributes(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        os.setxattr(source / "readme.txt", "user.own", b"mine")
        identity = repository.backup("source", cwd=tmp_path)["id"].encode()
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            for name in ("readme.txt", "documents/report.txt", "pictures/photo.raw"):
                file = mount / "source" / name
                digest = blake3((source / name).read_bytes()).hexdigest().encode()
                assert os.getxattr(file, "user.casfs.capture") == b"stable"
                assert os.getxattr(file, "user.casfs.captured") == digest
                assert os.getxattr(file, "user.casfs.observed") == digest
                assert os.getxattr(file, "user.casfs.snapshot") == identity
            assert os.listxattr(mount / "source/readme.txt") == ["user.own"]
            with pytest.raises(OSError, match="No data available"):
                os.getxattr(mount / "source/readme.txt", "user.casfs.no-such-thing")

    def test_the_casfs_folder_is_reachable_but_not_listed(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        snapshot = repository.backup("source", cwd=tmp_path)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            assert os.listdir(mount) == ["source"]
            reported = json.loads((mount / ".casfs/snapshot.json").read_bytes())
            assert snapshot["id"] in reported.values()
            manifest = (mount / ".casfs/manifest.b3").read_text()
            for name in ("readme.txt", "documents/report.txt", "pictures/photo.raw"):
                digest = blake3((source / name).read_bytes()).hexdigest()
                assert f"{digest}  source/{name}\n" in manifest
            assert len(manifest.splitlines()) == 4
            assert (mount / ".casfs/changed").read_bytes() == b""
            assert (mount / ".casfs/damage").read_bytes() == b""

    def test_a_casfs_folder_of_the_source_is_shown_as_it_is(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        (source / ".casfs").mkdir()
        (source / ".casfs" / "mine").write_bytes(b"not yours")
        repository.backup(".", cwd=source)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            assert rsync_differences(source, mount) == ""
            assert os.listdir(mount / ".casfs") == ["mine"]


@contextmanager
def never_still(file: Path) -> Iterator[None]:
    """Rewrite parts of a file for as long as the block runs."""
    done = threading.Event()

    def rewrite() -> None:
        handle = os.open(file, os.O_RDWR)
        size = os.fstat(handle).st_size
        try:
            while not done.is_set():
                os.pwrite(handle, os.urandom(4096), int.from_bytes(os.urandom(4)) % (size - 4096))
        finally:
            os.close(handle)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        yield
    finally:
        done.set()
        writer.join()


class TestFlaggedFiles:
    @pytest.fixture
    def flagged(self, repository: Casfs, source: Path, tmp_path: Path) -> Casfs:
        """A snapshot in which `restless` was never still while it was captured."""
        (source / "restless").write_bytes(os.urandom(16 * MIB))
        with never_still(source / "restless"):
            reported = repository.json(
                *("backup", "--attempts", "1", "--freeze", "never", "source"),
                expect=4,
                cwd=tmp_path,
            )
        assert reported.one("snapshot")["flagged"] == 1
        problems = [line for line in reported.of_type("problem") if line["kind"] == "changed"]
        assert [problem["path"] for problem in problems] == ["source/restless"]
        return repository

    def test_flagged_files_are_counted_and_listed_with_reason_and_digests(
        self, flagged: Casfs
    ) -> None:
        assert flagged.json("snapshots").one("snapshot")["flagged"] == 1
        shown = flagged.run("changed", "latest").text
        assert "source/restless" in shown
        assert "readme.txt" not in shown
        (line,) = flagged.json("changed", "latest").objects
        assert line["path"] == "source/restless"
        assert len(line["captured"]) == len(line["observed"]) == 64
        assert line["captured"] != line["observed"]
        assert line["attempts"] >= 1
        assert line["reason"]

    def test_flagged_files_are_no_damage_and_are_restored_as_captured(
        self, flagged: Casfs, source: Path, tmp_path: Path
    ) -> None:
        assert flagged.json("check", "--read-data").one("summary")["ok"] is True
        result = flagged.run("restore", "latest", "--target", tmp_path / "target")
        assert "source/restless" in result.complaint
        (line,) = flagged.json("changed", "latest").objects
        restored = (tmp_path / "target/source/restless").read_bytes()
        assert blake3(restored).hexdigest() == line["captured"]
        assert len(restored) == 16 * MIB

    def test_flagged_files_are_read_again_by_the_next_backup(
        self, flagged: Casfs, source: Path, tmp_path: Path
    ) -> None:
        snapshot = flagged.backup("source", cwd=tmp_path)
        assert snapshot["flagged"] == 0
        flagged.run("restore", "latest", "--target", tmp_path / "target")
        assert tree_differences(source, tmp_path / "target/source") == []

    def test_flagged_files_do_not_change_the_exit_code_with_changed_ok(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        (source / "restless").write_bytes(os.urandom(16 * MIB))
        with never_still(source / "restless"):
            repository.run(
                *("backup", "--attempts", "1", "--freeze", "never", "--changed-ok", "source"),
                cwd=tmp_path,
            )
        assert repository.json("snapshots").one("snapshot")["flagged"] == 1

    @pytest.mark.fuse
    def test_flagged_files_are_marked_by_the_mount_or_denied(
        self, flagged: Casfs, tmp_path: Path
    ) -> None:
        (line,) = flagged.json("changed", "latest").objects
        with mounted(flagged, "latest", at=tmp_path / "mount") as mount:
            restless = mount / "source/restless"
            assert blake3(restless.read_bytes()).hexdigest() == line["captured"]
            assert os.getxattr(restless, "user.casfs.capture") == b"changed"
            assert os.getxattr(restless, "user.casfs.observed").decode() == line["observed"]
            assert "source/restless" in (mount / ".casfs/changed").read_text()
        with mounted(flagged, "--deny-changed", "latest", at=tmp_path / "mount") as mount:
            with pytest.raises(OSError, match="Input/output error"):
                (mount / "source/restless").read_bytes()
            assert (mount / "source/readme.txt").read_bytes() == b"read me\n"
