"""Mounting: one snapshot as the file system it was, or all of them side by side."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

from tests.e2e.conftest import forget
from tests.support.cli import Casfs
from tests.support.comparing import rsync_differences, tree_differences
from tests.support.mounts import is_mounted, mounted, processes_naming, unmount_by_force
from tests.support.stored_objects import StoredObjects
from tests.support.waiting import wait_until

MIB = 1 << 20

pytestmark = pytest.mark.fuse


class TestSnapshotMount:
    def test_a_mounted_snapshot_is_the_root_of_the_mount(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup("source", cwd=tmp_path)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            assert os.listdir(mount) == ["source"]
            assert rsync_differences(source, mount / "source") == ""
            assert tree_differences(source, mount / "source") == []

    def test_a_snapshot_is_mounted_by_id_and_by_prefix(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        first = repository.backup("source", cwd=tmp_path)["id"]
        (source / "readme.txt").write_bytes(b"changed\n")
        repository.backup("source", cwd=tmp_path)
        for name in (first, first[:12]):
            with mounted(repository, name, at=tmp_path / "mount") as mount:
                assert (mount / "source/readme.txt").read_bytes() == b"read me\n"

    def test_a_directory_of_a_snapshot_can_be_mounted(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        """SNAP:PATH names something inside a snapshot wherever a snapshot is named."""
        repository.backup("source", cwd=tmp_path)
        at = tmp_path / "mount"
        at.mkdir()
        try:
            repository.run("mount", "latest:source/documents", at)
            assert rsync_differences(source / "documents", at) == ""
            repository.run("umount", at)
        finally:
            unmount_by_force(at)

    def test_an_inode_has_the_same_number_at_every_mount(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup(source)
        seen = []
        for _ in range(2):
            with mounted(repository, "latest", at=tmp_path / "mount") as mount:
                seen.append({str(path): os.lstat(path).st_ino for path in mount.rglob("*")})
        assert len(seen[0]) > 8
        assert seen[0] == seen[1]

    def test_a_mount_reports_its_size_to_df(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup(source)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            state = os.statvfs(mount)
            assert state.f_bavail == 0
            assert state.f_blocks * state.f_frsize >= MIB
            assert state.f_flag & os.ST_RDONLY

    def test_a_mount_serves_several_readers_at_once(
        self, repository: Casfs, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        source.mkdir()
        contents = {f"file{n}": os.urandom(3 * MIB + n) for n in range(8)}
        for name, content in contents.items():
            (source / name).write_bytes(content)
        repository.backup("source", cwd=tmp_path)
        wrong: list[str] = []
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:

            def read_all() -> None:
                for name, content in contents.items():
                    if (mount / "source" / name).read_bytes() != content:
                        wrong.append(name)

            readers = [threading.Thread(target=read_all) for _ in range(6)]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()
        assert wrong == []

    def test_a_mount_stays_readable_while_a_backup_runs(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup("source", cwd=tmp_path)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            (source / "new").write_bytes(os.urandom(MIB))
            repository.backup("source", cwd=tmp_path)
            assert (mount / "source/readme.txt").read_bytes() == b"read me\n"
            assert not (mount / "source/new").exists()
            assert (mount / "source/pictures/photo.raw").stat().st_size == MIB

    def test_a_mount_can_be_the_source_of_a_backup(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup("source", cwd=tmp_path)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            again = repository.backup("source", cwd=mount)
        assert (again["files"], again["new_bytes"] < 65536) == (4, True)


class TestRepositoryMount:
    def test_mounted_snapshots_are_found_by_id_time_host_and_tag(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        first = repository.backup(
            *("--host", "attic", "--tag", "daily", "--time", "2020-02-03T04:05:06Z", "source"),
            cwd=tmp_path,
        )["id"]
        (source / "readme.txt").write_bytes(b"second\n")
        second = repository.backup(
            *("--host", "cellar", "--tag", "daily", "--tag", "weekly"),
            *("--time", "2021-02-03T04:05:06Z", "source"),
            cwd=tmp_path,
        )["id"]
        with mounted(repository, at=tmp_path / "mount") as mount:
            assert set(os.listdir(mount)) >= {"ids", "snapshots", "hosts", "tags"}
            by_id = [name for name in os.listdir(mount / "ids") if name != "latest"]
            assert len(by_id) == 2
            for identity, content in ((first, b"read me\n"), (second, b"second\n")):
                (name,) = [name for name in by_id if identity.startswith(name)]
                assert (mount / "ids" / name / "source/readme.txt").read_bytes() == content
            times = sorted(name for name in os.listdir(mount / "snapshots") if name != "latest")
            assert len(times) == 2
            assert times[0].startswith("2020-02-03")
            assert times[1].startswith("2021-02-03")
            for folder, expected in (
                ("snapshots/latest", b"second\n"),
                (f"snapshots/{times[0]}", b"read me\n"),
                ("hosts/attic/latest", b"read me\n"),
                ("hosts/cellar/latest", b"second\n"),
                ("tags/daily/latest", b"second\n"),
                ("tags/weekly/latest", b"second\n"),
            ):
                assert (mount / folder / "source/readme.txt").read_bytes() == expected, folder
            assert sorted(os.listdir(mount / "hosts")) == ["attic", "cellar"]
            assert sorted(os.listdir(mount / "tags")) == ["daily", "weekly"]
            assert rsync_differences(source, mount / "snapshots/latest/source") == ""

    def test_new_snapshots_appear_in_a_running_mount(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup("--host", "attic", "source", cwd=tmp_path)
        with mounted(repository, at=tmp_path / "mount") as mount:
            latest = mount / "snapshots/latest/source/readme.txt"
            assert latest.read_bytes() == b"read me\n"
            (source / "readme.txt").write_bytes(b"younger\n")
            new = repository.backup("--host", "new", "--tag", "t", "source", cwd=tmp_path)["id"]
            wait_until(
                lambda: any(new.startswith(name) for name in os.listdir(mount / "ids")),
                "the new snapshot is among the ids",
            )
            wait_until(lambda: "new" in os.listdir(mount / "hosts"), "and its host")
            wait_until(lambda: "t" in os.listdir(mount / "tags"), "and its tag")
            wait_until(lambda: latest.read_bytes() == b"younger\n", "and it is the latest")
            assert len([n for n in os.listdir(mount / "snapshots") if n != "latest"]) == 2

    def test_a_mount_of_an_empty_repository_shows_the_first_snapshot_when_it_comes(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        with mounted(repository, at=tmp_path / "mount") as mount:
            assert os.listdir(mount / "hosts") == []
            repository.backup("source", cwd=tmp_path)
            wait_until(lambda: os.listdir(mount / "hosts") != [], "the first snapshot")

    def test_mounted_snapshots_of_the_same_second_have_different_names(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        for number in range(3):
            (source / "readme.txt").write_bytes(b"%d" % number)
            repository.backup("--time", "2020-02-03T04:05:06Z", "source", cwd=tmp_path)
        with mounted(repository, at=tmp_path / "mount") as mount:
            times = [name for name in os.listdir(mount / "snapshots") if name != "latest"]
            assert len(times) == len(set(times)) == 3
            found = {(mount / "snapshots" / t / "source/readme.txt").read_bytes() for t in times}
            assert found == {b"0", b"1", b"2"}

    def test_hosts_and_tags_that_are_no_file_names_are_found_in_the_mount(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        for tag in ("a/b", "..", ".", "x" * 300):
            result = repository.run("backup", "--tag", tag, "source", cwd=tmp_path, expect=None)
            assert result.exit in (0, 2), result
        repository.backup("--tag", "plain", "source", cwd=tmp_path)
        with mounted(repository, at=tmp_path / "mount") as mount:
            tags = os.listdir(mount / "tags")
            assert "plain" in tags
            for tag in tags:
                assert (mount / "tags" / tag / "latest/source/readme.txt").exists(), tag


class TestMountCommand:
    def test_mount_returns_when_the_mount_is_usable_and_prints_where(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup("source", cwd=tmp_path)
        at = tmp_path / "mount"
        at.mkdir()
        try:
            printed = repository.json("mount", "latest", at)
            assert is_mounted(at)
            assert (at / "source/readme.txt").read_bytes() == b"read me\n"
            assert printed.one("mounted")["mountpoint"] == str(at)
            gone = repository.json("umount", at)
            assert gone.one("unmounted")["mountpoint"] == str(at)
            assert not is_mounted(at)
        finally:
            unmount_by_force(at)

    def test_umount_leaves_no_process_behind(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup("source", cwd=tmp_path)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            assert processes_naming(mount)
        wait_until(lambda: not processes_naming(tmp_path / "mount"), "the mount's process ends")

    def test_a_mount_in_the_background_keeps_nothing_of_its_terminal(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        """Otherwise `casfs mount … | cat` would hang: run() itself waits for the pipes to close."""
        repository.backup("source", cwd=tmp_path)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            (process, *_) = processes_naming(mount)
            assert os.readlink(f"/proc/{process}/fd/0") == "/dev/null"
            assert os.getsid(process) != os.getsid(0)
            cwd = os.readlink(f"/proc/{process}/cwd")
            assert not cwd.startswith(str(tmp_path)), "it would keep that directory busy"

    def test_mount_accepts_a_relative_mountpoint_and_one_behind_a_link(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup("source", cwd=tmp_path)
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        try:
            for name in ("real", "./real/", "link", f"../{tmp_path.name}/real"):
                repository.run("mount", "latest", name, cwd=tmp_path)
                assert is_mounted(tmp_path / "real"), name
                repository.run("umount", name, cwd=tmp_path)
                assert not is_mounted(tmp_path / "real"), name
        finally:
            unmount_by_force(tmp_path / "real")

    def test_mount_accepts_a_mountpoint_with_a_hostile_name(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup("source", cwd=tmp_path)
        for name in ("with space", "back\\slash", "tab\t", "comma,ro", "new\nline", "ünï"):
            with mounted(repository, "latest", at=tmp_path / name) as mount:
                assert (mount / "source/readme.txt").read_bytes() == b"read me\n"

    def test_mount_accepts_a_relative_repository(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        """A process in the background has another working directory."""
        repository.backup("source", cwd=tmp_path)
        at = tmp_path / "mount"
        at.mkdir()
        try:
            repository.run("-r", "repository", "mount", "mount", cwd=tmp_path)
            repository.backup("source", cwd=tmp_path)
            wait_until(lambda: len(os.listdir(at / "ids")) >= 2, "the new snapshot")
            repository.run("umount", at)
        finally:
            unmount_by_force(at)

    def test_mount_in_the_foreground_runs_until_it_is_unmounted(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup("source", cwd=tmp_path)
        at = tmp_path / "mount"
        at.mkdir()
        process = repository.start("mount", "--json", "--foreground", "latest", at)
        try:
            assert process.stdout is not None
            line = json.loads(process.stdout.readline())
            assert (line["type"], line["mountpoint"]) == ("mounted", str(at))
            assert (at / "source/readme.txt").read_bytes() == b"read me\n"
            assert process.poll() is None
            repository.run("umount", at)
            _, err = process.communicate(timeout=30)
            assert (process.returncode, err) == (0, b"")
        finally:
            unmount_by_force(at)
            if process.poll() is None:
                process.kill()
                process.communicate()

    def test_the_owner_option_shows_every_entry_with_that_owner(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup("source", cwd=tmp_path)
        with mounted(repository, "--owner", "1234:5678", "latest", at=tmp_path / "mount") as mount:
            for path in (mount / "source", *(mount / "source").rglob("*")):
                state = path.lstat()
                assert (state.st_uid, state.st_gid) == (1234, 5678), path

    @pytest.mark.parametrize("size", ["1M", "1048576", "2G"])
    def test_cache_size_bounds_the_cache_and_not_the_readable_data(
        self, repository: Casfs, tmp_path: Path, size: str
    ) -> None:
        data = os.urandom(12 * MIB)
        (tmp_path / "big").write_bytes(data)
        repository.backup("big", cwd=tmp_path)
        with mounted(repository, "--cache-size", size, "latest", at=tmp_path / "mount") as mount:
            for _ in range(2):
                assert (mount / "big").read_bytes() == data

    def test_other_users_see_nothing_unless_they_are_allowed(
        self, repository: Casfs, source: Path, superuser: None
    ) -> None:
        """The folder has to be one that others can reach, which pytest's is not."""
        # The snapshot's root has the mode of the directory that the backup was made in.
        source.parent.chmod(0o755)
        repository.backup("source", cwd=source.parent)
        folder = Path(tempfile.mkdtemp(prefix="casfs-e2e-"))
        folder.chmod(0o755)
        at = folder / "mount"
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat"]
        try:
            for option, expected in (((), False), (("--allow-other",), True)):
                with mounted(repository, *option, "latest", at=at) as mount:
                    done = subprocess.run(
                        [*command, str(mount / "source/readme.txt")],
                        capture_output=True,
                        check=False,
                    )
                    assert (done.stdout == b"read me\n") is expected, done
            # Permissions are enforced by the kernel, as on any file system.
            (source / "readme.txt").chmod(0o600)
            repository.backup("source", cwd=source.parent)
            with mounted(repository, "--allow-other", "latest", at=at) as mount:
                done = subprocess.run(
                    [*command, str(mount / "source/readme.txt")], capture_output=True, check=False
                )
                assert b"Permission denied" in done.stderr
        finally:
            unmount_by_force(at)
            forget(folder)


class TestAttributes:
    @pytest.mark.parametrize(
        "command",
        [
            ("cp", "-a", "--", "{mount}/source", "{target}"),
            ("rsync", "-aAX", "{mount}/source", "{target}"),
            ("tar", "-cf", "{target}/tar", "-C", "{mount}", "source"),
        ],
        ids=["cp", "rsync", "tar"],
    )
    def test_a_snapshot_without_attributes_is_copied_without_a_complaint(
        self, repository: Casfs, source: Path, tmp_path: Path, command: tuple[str, ...]
    ) -> None:
        assert not any(os.listxattr(path) for path in (source, source / "readme.txt"))
        # rsync leaves a time that is already right to the second: a copy made within the same
        # second as the source would keep its own nanoseconds.
        for path in [*source.rglob("*"), source]:
            os.utime(path, ns=(1_000_000_007, 1_000_000_007), follow_symlinks=False)
        repository.backup("source", cwd=tmp_path)
        target = tmp_path / "target"
        target.mkdir()
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            done = subprocess.run(
                [part.format(mount=mount, target=target) for part in command],
                capture_output=True,
                check=False,
            )
            assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
            with pytest.raises(OSError, match="not supported"):
                os.listxattr(mount / "source/readme.txt")
            facts = os.getxattr(mount / "source/readme.txt", "user.casfs.capture")
            assert facts == b"stable"
        if command[0] != "tar":
            assert tree_differences(source, target / "source") == []


class TestPageCache:
    def test_a_small_file_that_is_open_can_be_read_while_the_server_is_stopped(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup("source", cwd=tmp_path)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            # Then the pack is open, so that the next file is at hand.
            assert (mount / "source/readme.txt").read_bytes() == b"read me\n"
            (server,) = processes_naming(mount)
            found: list[bytes] = []
            with (mount / "source/documents/report.txt").open("rb", buffering=0) as file:
                os.kill(server, signal.SIGSTOP)
                try:
                    reader = threading.Thread(
                        target=lambda: found.append(file.read(1 << 20) or b"")
                    )
                    reader.start()
                    reader.join(60)
                    assert found == [b"a report\n" * 1000]
                finally:
                    os.kill(server, signal.SIGCONT)
                    reader.join(60)

    def test_a_file_whose_pages_the_kernel_dropped_is_read_again(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup("source", cwd=tmp_path)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            for _ in range(4):
                for name in ("readme.txt", "documents/report.txt", "documents/letters/to-anna.txt"):
                    with (mount / "source" / name).open("rb") as file:
                        assert file.read() == (source / name).read_bytes()
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def test_many_readers_of_the_same_small_files_whose_pages_are_dropped_all_get_their_bytes(
        self, repository: Casfs, tmp_path: Path
    ) -> None:
        contents = {f"{n:02}": random.Random(n).randbytes(1 + 3000 * n) for n in range(40)}
        (tmp_path / "source").mkdir()
        for name, content in contents.items():
            (tmp_path / "source" / name).write_bytes(content)
        repository.backup("source", cwd=tmp_path)
        wrong: list[str] = []

        def read(mount: Path, seed: int) -> None:
            dice = random.Random(seed)
            for _ in range(400):
                name = dice.choice(list(contents))
                with (mount / "source" / name).open("rb", buffering=0) as file:
                    if dice.randrange(3) == 0:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    if file.read() != contents[name]:
                        wrong.append(name)

        with mounted(repository, "--cache-size", "1M", "latest", at=tmp_path / "mount") as mount:
            readers = [threading.Thread(target=read, args=(mount, seed)) for seed in range(6)]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()
        assert wrong == []


class TestMountOfDamage:
    def test_a_damaged_chunk_is_a_read_error_for_its_range_only(
        self, repository: Casfs, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        source.mkdir()
        data = os.urandom(24 * MIB)
        (source / "big").write_bytes(data)
        (source / "small").write_bytes(b"unharmed")
        repository.backup("source", cwd=tmp_path)
        objects = StoredObjects(repository)
        objects.flip(objects.largest_pack().name, 12 * MIB)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            handle = os.open(mount / "source/big", os.O_RDONLY)
            good, bad = 0, []
            try:
                for offset in range(0, len(data), 65536):
                    try:
                        found = os.pread(handle, 65536, offset)
                        assert len(found) > 0
                        assert found == data[offset : offset + len(found)]
                        good += 1
                    except OSError as error:
                        assert error.strerror == "Input/output error"
                        bad.append(offset)
            finally:
                os.close(handle)
            assert bad, "the damage was not noticed"
            assert max(bad) - min(bad) < 8 * MIB, "more is lost than the one chunk"
            assert good * 65536 > 16 * MIB
            assert (mount / "source/small").read_bytes() == b"unharmed"
            with pytest.raises(OSError, match="Input/output error"):
                (mount / "source/big").read_bytes()
            assert is_mounted(mount), "the mount goes on"
