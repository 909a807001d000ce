"""A mount under real programs, under damage, and at its beginning and end."""

from __future__ import annotations

import json
import mmap
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from blake3 import blake3

from tests.e2e.conftest import forget
from tests.support.builders import Plan, RepositoryFixture, file, flagged
from tests.support.cli import Casfs, finish, interrupt
from tests.support.comparing import rsync_differences
from tests.support.mounts import (
    is_mounted,
    mount_namespace,
    mounted,
    processes_naming,
    tmpfs,
    unmount_by_force,
)
from tests.support.stored_objects import StoredObjects
from tests.support.waiting import wait_until

MIB = 1 << 20
NOBODY = 65534

pytestmark = pytest.mark.fuse


def output(*command: str | Path, cwd: Path | None = None, expect: int = 0) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == expect, f"{command}: exit {done.returncode}\n{done.stderr}"
    return done.stdout


class TestPrograms:
    """Programs that know nothing of casfs, in a mounted tree."""

    def test_tar_diff_rsync_and_find_see_no_difference_in_the_mount(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup("source", cwd=tmp_path)
        output("tar", "-cf", tmp_path / "source.tar", "-C", tmp_path, "source")
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            assert output("tar", "--compare", "-f", tmp_path / "source.tar", "-C", mount) == ""
            assert output("diff", "-r", source, mount / "source") == ""
            assert rsync_differences(source, mount / "source") == ""
            shown = "%P %s %m %U %G %T@ %l\n"
            printed = [
                sorted(output("find", root, "-not", "-type", "d", "-printf", shown).splitlines())
                for root in (source, mount / "source")
            ]
            assert printed[0] == printed[1]

    def test_find_newer_files_works_in_the_mount(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        os.utime(source / "readme.txt", (2_000_000_000, 2_000_000_000))
        repository.backup("source", cwd=tmp_path)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            found = output("find", mount / "source", "-newermt", "2030-01-01", "-type", "f")
            assert found.split() == [str(mount / "source/readme.txt")]

    def test_git_works_in_a_mounted_clone(self, repository: Casfs, tmp_path: Path) -> None:
        clone = tmp_path / "clone"
        output("git", "init", "-q", clone)
        for n in range(3):
            (clone / f"file{n}").write_text(f"text {n}\n" * 1000)
            output("git", "-C", clone, "add", ".")
            output(
                *("git", "-C", clone, "-c", "user.name=a", "-c", "user.email=b@c"),
                *("commit", "-qm", f"change {n}"),
            )
        output("git", "-C", clone, "gc", "-q")
        repository.backup("clone", cwd=tmp_path)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            safe = ("git", "-c", "safe.directory=*", "-C", str(mount / "clone"))
            output(*safe, "fsck", "--strict")
            assert output(*safe, "log", "--format=%s").split("\n")[0] == "change 2"
            assert output(*safe, "--no-optional-locks", "status", "--porcelain") == ""

    def test_sqlite_reads_a_mounted_database(self, repository: Casfs, tmp_path: Path) -> None:
        with sqlite3.connect(tmp_path / "data.db") as database:
            database.execute("create table t (n integer primary key, text text)")
            database.executemany("insert into t values (?, ?)", ((n, "x" * n) for n in range(2000)))
        database.close()
        repository.backup("data.db", cwd=tmp_path)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            shown = sqlite3.connect(f"file:{mount / 'data.db'}?mode=ro", uri=True)
            assert shown.execute("pragma integrity_check").fetchone() == ("ok",)
            assert shown.execute("select sum(length(text)) from t").fetchone() == (1999 * 1000,)
            shown.close()

    def test_mounted_programs_run_with_their_libraries_and_modules(
        self, repository: Casfs, tmp_path: Path
    ) -> None:
        (tmp_path / "tree").mkdir()
        shutil.copy("/bin/ls", tmp_path / "tree" / "program")
        libraries = output("ldd", "/bin/ls")
        library = Path(re.findall(r"=> (/\S*libc\S*)", libraries)[0])
        shutil.copy(library, tmp_path / "tree" / "library.so")
        (tmp_path / "tree" / "package").mkdir()
        (tmp_path / "tree" / "package" / "__init__.py").write_text("answer = 42\n")
        repository.backup("tree", cwd=tmp_path)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            assert "package" in output(mount / "tree/program", mount / "tree")
            code = "import ctypes, package; print(ctypes.CDLL('./library.so').abs(-package.answer))"
            assert output(sys.executable, "-Bc", code, cwd=mount / "tree") == "42\n"

    def test_mounted_files_can_be_mapped_into_memory(
        self, repository: Casfs, tmp_path: Path
    ) -> None:
        data = random.Random(1).randbytes(9 * MIB + 5)
        (tmp_path / "big").write_bytes(data)
        repository.backup("big", cwd=tmp_path)
        with (
            mounted(repository, "latest", at=tmp_path / "mount") as mount,
            (mount / "big").open("rb") as shown,
        ):
            for kind in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
                with mmap.mmap(shown.fileno(), 0, kind, mmap.PROT_READ) as area:
                    assert area[-7:] == data[-7:]
                    assert area[MIB - 9 : MIB * 3] == data[MIB - 9 : MIB * 3]

    def test_cp_copies_holes_of_the_mount_as_holes(self, repository: Casfs, tmp_path: Path) -> None:
        with (tmp_path / "sparse").open("wb") as sparse:
            sparse.truncate(64 * MIB)
            sparse.seek(40 * MIB)
            sparse.write(b"island")
        repository.backup("sparse", cwd=tmp_path)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            assert (mount / "sparse").stat().st_blocks < 10_000
            output("cp", "--sparse=always", mount / "sparse", tmp_path / "copy")
        assert (tmp_path / "copy").stat().st_blocks * 512 < MIB
        assert (tmp_path / "copy").read_bytes() == (tmp_path / "sparse").read_bytes()

    def test_fio_verifies_mounted_data_with_several_jobs(
        self, repository: Casfs, tmp_path: Path
    ) -> None:
        """Every block that fio wrote holds its own place and checksum."""
        (tmp_path / "tree").mkdir()
        common = (
            *("--filename=data", "--bs=4k", "--size=16m", "--verify=crc32c", "--thread"),
            *("--output-format=json", "--verify_state_save=0", f"--aux-path={tmp_path}"),
        )
        write = ("--name=written", "--rw=write", "--do_verify=0")
        output("fio", *write, *common, cwd=tmp_path / "tree")
        repository.backup("tree", cwd=tmp_path)
        jobs: list[str] = []
        for n, kind in enumerate(("randread", "read", "randread")):
            jobs += [f"--name=job{n}", f"--rw={kind}", f"--randseed={n + 5}"]
        with mounted(repository, "--cache-size", "4M", "latest", at=tmp_path / "mount") as mount:
            printed = output("fio", "--readonly", *common, *jobs, cwd=mount / "tree")
        reported = json.loads(printed)["jobs"]
        assert [(job["error"], job["read"]["io_bytes"]) for job in reported] == [(0, 16 * MIB)] * 3

    def test_du_counts_the_same_bytes_in_the_mount(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        """Directories, whose sizes are the file system's own affair, are left out."""
        os.link(source / "readme.txt", source / "second-name")
        with (source / "sparse").open("wb") as sparse:
            sparse.truncate(3 * MIB)
        repository.backup("source", cwd=tmp_path)
        count = "find . -not -type d -print0 | du -cb --files0-from=- | tail -n 1"
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            printed = [output("sh", "-c", count, cwd=root) for root in (source, mount / "source")]
        assert printed[0] == printed[1]
        assert int(printed[0].split()[0]) > 4 * MIB

    def test_concurrent_walkers_see_the_same_tree_in_the_mount(
        self, repository: Casfs, tmp_path: Path
    ) -> None:
        """As locate's updatedb, a virus scanner and an indexer would in one night."""
        for n in range(60):
            folder = tmp_path / "tree" / f"{n % 7}" / f"{n}"
            folder.mkdir(parents=True)
            for m in range(40):
                (folder / f"file {m}").write_bytes(b"%d %d" % (n, m))
        repository.backup("tree", cwd=tmp_path)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            walkers = [
                subprocess.Popen(command, cwd=mount / "tree", stdout=subprocess.PIPE)
                for command in 2 * (["find", ".", "-ls"], ["grep", "-rc", "7", "."], ["ls", "-lR"])
            ]
            printed = [walker.communicate(timeout=120)[0] for walker in walkers]
        assert [walker.returncode for walker in walkers] == [0] * 6
        for one, other in zip(printed[:3], printed[3:], strict=True):
            assert sorted(one.splitlines()) == sorted(other.splitlines())
        assert len(printed[0].splitlines()) == 1 + 7 + 60 + 60 * 40
        expected = output("grep", "-rc", "7", ".", cwd=tmp_path / "tree")
        assert sorted(expected.splitlines()) == sorted(printed[1].decode().splitlines())

    def test_an_overlay_works_with_the_mount_as_its_lower_layer(
        self, repository: Casfs, source: Path, tmp_path: Path, superuser: None
    ) -> None:
        repository.backup("source", cwd=tmp_path)
        with (
            tmpfs(tmp_path / "layers") as layers,
            mounted(repository, "latest", at=tmp_path / "mount") as mount,
        ):
            for name in ("upper", "work", "merged"):
                (layers / name).mkdir()
            options = f"lowerdir={mount},upperdir={layers / 'upper'},workdir={layers / 'work'}"
            merged = layers / "merged"
            output("mount", "-t", "overlay", "casfs-test", "-o", options, merged)
            try:
                (merged / "source" / "readme.txt").write_bytes(b"changed above\n")
                (merged / "source" / "new").write_bytes(b"new\n")
                assert (merged / "source/readme.txt").read_bytes() == b"changed above\n"
                assert (mount / "source/readme.txt").read_bytes() == b"read me\n"
                assert sorted(os.listdir(merged / "source"))[-3:-1] == ["new", "pictures"]
            finally:
                output("umount", merged)

    def test_attribute_lists_of_the_mount_show_only_the_files_own(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        os.setxattr(source / "readme.txt", "user.own", b"mine")
        repository.backup("source", cwd=tmp_path)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            shown = mount / "source/readme.txt"
            assert os.listxattr(shown) == ["user.own"]
            assert os.getxattr(shown, "user.casfs.capture") == b"stable"
            assert os.getxattr(shown, "user.casfs.captured") == (
                blake3(b"read me\n").hexdigest().encode()
            )
            printed = output("getfattr", "--absolute-names", "-d", "-m", "-", shown)
            assert "casfs" not in printed
            with pytest.raises(OSError, match="No data available"):
                os.getxattr(shown, "user.other")

    def test_access_lists_of_the_mount_admit_other_users(
        self, repository: Casfs, superuser: None
    ) -> None:
        """The mode alone would give the opposite answer in both cases."""
        folder = Path(tempfile.mkdtemp(prefix="casfs-e2e-"))
        folder.chmod(0o755)
        (folder / "tree").mkdir(mode=0o755)
        for name, acl in (("let-in", "u:65534:r"), ("kept-out", "u:65534:-,g::r")):
            (folder / "tree" / name).write_bytes(b"content")
            (folder / "tree" / name).chmod(0o600)
            output("setfacl", "-m", acl, folder / "tree" / name)
        (folder / "tree" / "kept-out").chmod(0o644)
        output("setfacl", "-m", "u:65534:-", folder / "tree" / "kept-out")
        repository.backup("tree", cwd=folder)
        at = folder / "mount"
        nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat")
        try:
            with mounted(repository, "--allow-other", "latest", at=at) as mount:
                assert output(*nobody, mount / "tree/let-in") == "content"
                output(*nobody, mount / "tree/kept-out", expect=1)
        finally:
            unmount_by_force(at)
            forget(folder)


class TestReports:
    def test_reports_of_a_mount_are_reachable_but_not_listed(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        identity = repository.backup("--host", "attic", "source", cwd=tmp_path)["id"]
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            assert os.listdir(mount) == ["source"]
            assert sorted(os.listdir(mount / ".casfs")) == [
                "changed",
                "damage",
                "manifest.b3",
                "snapshot.json",
            ]
            reported = json.loads((mount / ".casfs/snapshot.json").read_bytes())
            assert (reported["id"], reported["host"], reported["flagged"]) == (identity, "attic", 0)
            assert (mount / ".casfs/changed").read_bytes() == b""
            assert (mount / ".casfs/damage").read_bytes() == b""
            output("find", mount, "-name", ".casfs", "-exec", "false", "{}", "+")

    def test_the_manifest_of_a_mount_checks_the_mount_and_the_source(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        for n in range(3000):
            (source / "documents" / f"number {n}").write_bytes(b"%d" % n)
        (source / "new\nline \\").write_bytes(b"odd")
        repository.backup("source", cwd=tmp_path)
        with mounted(repository, "latest", at=tmp_path / "mount") as mount:
            lines = (mount / ".casfs/manifest.b3").read_bytes().splitlines()
            assert len(lines) == 4 + 3001
            for root in (mount, tmp_path):
                for line in lines:
                    digest, _, name = line.lstrip(b"\\").partition(b"  ")
                    if line.startswith(b"\\"):
                        name = name.replace(b"\\n", b"\n").replace(b"\\\\", b"\\")
                    content = (root / os.fsdecode(name)).read_bytes()
                    assert blake3(content).hexdigest().encode() == digest
            manifest = mount / ".casfs/manifest.b3"
            for root in (mount, tmp_path):
                assert output("b3sum", "--check", "--quiet", manifest, cwd=root) == ""
            (source / "readme.txt").write_bytes(b"read mE\n")
            printed = output("b3sum", "--check", manifest, cwd=tmp_path, expect=1)
            assert "source/readme.txt: FAILED" in printed
            output("cp", mount / ".casfs/manifest.b3", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes().splitlines() == lines

    def test_every_snapshot_of_a_repository_mount_has_reports(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        identity = repository.backup("source", cwd=tmp_path)["id"]
        with mounted(repository, at=tmp_path / "mount") as mount:
            reported = json.loads((mount / "ids" / identity / ".casfs/snapshot.json").read_bytes())
            assert reported["id"] == identity
            assert not (mount / ".casfs").exists()

    def test_reports_name_files_that_changed_during_the_backup(
        self, casfs: Casfs, tmp_path: Path
    ) -> None:
        # No backup can be made to hold this at will.
        fixture = RepositoryFixture(tmp_path)
        fixture.store(b"mixture")
        plan: Plan = {b"d": {b"odd\nname": flagged(file(b"", b"mixture"))}, b"f": b"sound"}
        fixture.publish(plan)
        if casfs.repository is None:
            casfs.at(fixture.root).run("mirror", casfs.where)
        with mounted(
            casfs, "--log-file", tmp_path / "log", "latest", at=tmp_path / "mount"
        ) as mount:
            assert (mount / ".casfs/changed").read_bytes() == b"d/odd\\nname\n"
            shown = mount / "d/odd\nname"
            assert os.getxattr(shown, "user.casfs.capture") == b"changed"
            assert os.getxattr(shown, "user.casfs.reason") == b"rewritten"
            for _ in range(3):
                assert shown.read_bytes() == b"mixture"
            wait_until(lambda: b"changed while" in (tmp_path / "log").read_bytes(), "a warning")
            assert (tmp_path / "log").read_bytes().count(b"changed while") == 1
        with mounted(casfs, "--deny-changed", "--log-file", tmp_path / "log", "latest", at=mount):
            with pytest.raises(OSError, match="Input/output error"):
                (mount / "d/odd\nname").read_bytes()
            assert (mount / "f").read_bytes() == b"sound"
            assert b"denied" in (tmp_path / "log").read_bytes()


class TestDamageInMount:
    @pytest.fixture
    def big(self, repository: Casfs, tmp_path: Path) -> bytes:
        data = random.Random(3).randbytes(20 * MIB)
        (tmp_path / "tree").mkdir()
        (tmp_path / "tree" / "big").write_bytes(data)
        (tmp_path / "tree" / "small").write_bytes(b"unharmed")
        repository.backup("tree", cwd=tmp_path)
        return data

    def test_damage_is_listed_with_file_range_blob_and_pack(
        self, repository: Casfs, big: bytes, tmp_path: Path
    ) -> None:
        objects = StoredObjects(repository)
        pack = objects.largest_pack()
        objects.flip(pack.name, 10 * MIB)
        log = tmp_path / "log"
        with mounted(repository, "--log-file", log, "latest", at=tmp_path / "mount") as mount:
            lost = []
            with (mount / "tree/big").open("rb", buffering=0) as shown:
                for offset in range(0, len(big), 4096):
                    try:
                        assert os.pread(shown.fileno(), 4096, offset) == big[offset:][:4096]
                    except OSError as error:
                        assert error.errno == 5
                        lost.append(offset)
            (line,) = (mount / ".casfs/damage").read_text().splitlines()
            found = re.fullmatch(
                r"tree/big: bytes (\d+) to (\d+): blob ([0-9a-f]{64}) in pack ([0-9a-f]{64}): .+",
                line,
            )
            assert found is not None, line
            begin, end = int(found[1]), int(found[2]) + 1
            assert lost == list(range(begin // 4096 * 4096, end, 4096)), "to the page"
            assert found[4] == pack.digest
            assert line in log.read_text()
            assert log.read_text().count("tree/big") == 1

    def test_a_missing_pack_is_a_read_error_until_it_returns(
        self, repository: Casfs, big: bytes, tmp_path: Path
    ) -> None:
        objects = StoredObjects(repository)
        pack = objects.largest_pack().name
        kept = objects.read(pack)
        with mounted(
            repository, "--log-file", tmp_path / "log", "latest", at=tmp_path / "mount"
        ) as mount:
            objects.delete(pack)
            with pytest.raises(OSError, match="Input/output error"):
                (mount / "tree/big").read_bytes()
            objects.write(pack, kept)
            wait_until(lambda: reads(mount / "tree/big") == big, "the failure is forgotten")

    def test_a_missing_repository_is_an_error_and_does_not_end_the_mount(
        self, repository: Casfs, big: bytes, tmp_path: Path
    ) -> None:
        objects = StoredObjects(repository)
        aside = {
            name: objects.read(name)
            for name in ("config", *(one.name for one in objects.below("snapshots")))
        }
        with mounted(repository, "--log-file", tmp_path / "log", at=tmp_path / "mount") as mount:
            for name in aside:
                objects.delete(name)
            try:
                wait_until(lambda: not lists(mount / "snapshots"), "the loss is noticed")
                assert is_mounted(mount)
            finally:
                for name, data in aside.items():
                    objects.write(name, data)
            wait_until(lambda: lists(mount / "snapshots"), "it is back")
            assert (mount / "snapshots/latest/tree/small").read_bytes() == b"unharmed"


def reads(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError as error:
        assert error.errno == 5
        return None


def lists(folder: Path) -> bool:
    try:
        return bool(os.listdir(folder))
    except OSError as error:
        assert error.errno == 5
        return False


class TestChangingRepositoryMount:
    def test_a_forgotten_snapshot_leaves_a_running_mount(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        first = repository.backup("--host", "gone", "source", cwd=tmp_path)["id"]
        second = repository.backup("--host", "stays", "source", cwd=tmp_path)["id"]
        with mounted(repository, at=tmp_path / "mount") as mount:
            open_file = (mount / "hosts/gone/latest/source/readme.txt").open("rb")
            StoredObjects(repository).delete(f"snapshots/{first}")
            wait_until(lambda: os.listdir(mount / "hosts") == ["stays"], "the host leaves")
            wait_until(
                lambda: sorted(os.listdir(mount / "ids")) == [second[:12], "latest"],
                "the id leaves",
            )
            wait_until(lambda: not (mount / "ids" / first).exists(), "its whole id too")
            assert open_file.read() == b"read me\n"
            open_file.close()

    def test_a_retagged_snapshot_is_shown_with_its_new_tags_and_id(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        repository.backup("source", cwd=tmp_path)
        with mounted(repository, at=tmp_path / "mount") as mount:
            assert os.listdir(mount / "tags") == []
            repository.run("tag", "latest", "--add", "kept")
            wait_until(lambda: os.listdir(mount / "tags") == ["kept"], "the tag")
            assert len(os.listdir(mount / "ids")) == 2
            kept = mount / "tags/kept/latest/source/readme.txt"
            assert kept.read_bytes() == b"read me\n"

    def test_versions_of_every_path_are_links_in_the_mount(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        for content in (b"one\n", b"one\n", b"two\n"):
            (source / "readme.txt").write_bytes(content)
            repository.backup("source", cwd=tmp_path)
        reported = repository.json("log", "latest:source/readme.txt").of_type("version")
        assert [len(version["snapshot_ids"]) for version in reported] == [2, 1]
        with mounted(repository, at=tmp_path / "mount") as mount:
            folder = mount / "versions/source/readme.txt"
            contents = [(folder / name).read_bytes() for name in sorted(os.listdir(folder))]
            assert contents == [b"one\n", b"two\n", b"two\n"]
            assert len(os.listdir(mount / "versions/source/documents")) == 1 + 1
            assert not (mount / "versions/source/nothing").exists()
            (source / "readme.txt").write_bytes(b"three\n")
            repository.backup("source", cwd=tmp_path)
            wait_until(lambda: len(os.listdir(folder)) == 3 + 1, "the new version")
            assert (folder / "latest").read_bytes() == b"three\n"

    def test_no_two_files_of_a_repository_mount_share_an_inode_number(
        self, repository: Casfs, source: Path, tmp_path: Path
    ) -> None:
        for n in range(5):
            (source / "readme.txt").write_bytes(b"%d" % n)
            repository.backup("source", cwd=tmp_path)
        with mounted(repository, at=tmp_path / "mount") as mount:
            seen: dict[tuple[int, int], str] = {}
            for folder, directories, files in os.walk(mount):
                for name in directories + files:
                    path = os.path.join(folder, name)
                    state = os.lstat(path)
                    other = seen.setdefault((state.st_dev, state.st_ino), path)
                    assert other == path
            assert len(seen) > 5 * 8


@contextmanager
def fuse_for_everybody(folder: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Give every user a FUSE device, in a mount namespace of its own; yield how to run in there."""
    with mount_namespace() as repo:
        inside = ("nsenter", f"--mount=/proc/{repo}/ns/mnt", f"--wd={folder}", "--")
        output(*inside, "mknod", "-m", "666", folder / "fuse", "c", "10", "229")
        output(*inside, "mount", "--bind", folder / "fuse", "/dev/fuse")
        yield repo, inside


class TestMountServer:
    @pytest.fixture
    def snapshot(self, repository: Casfs, source: Path, tmp_path: Path) -> Iterator[Path]:
        repository.backup("source", cwd=tmp_path)
        at = tmp_path / "mount"
        at.mkdir()
        yield at
        unmount_by_force(at)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_a_signal_unmounts_and_ends_the_server(
        self, repository: Casfs, snapshot: Path, number: int
    ) -> None:
        repository.run("mount", "latest", snapshot)
        (process,) = processes_naming(snapshot)
        os.kill(process, number)
        wait_until(lambda: not is_mounted(snapshot), "it is unmounted")
        wait_until(lambda: not processes_naming(snapshot), "and it ended")
        repository.run("mount", "latest", snapshot)
        repository.run("umount", snapshot)

    def test_a_server_in_the_foreground_ends_cleanly_at_every_way_of_unmounting(
        self, repository: Casfs, snapshot: Path
    ) -> None:
        ways: list[list[str]] = [["fusermount3", "-u"], ["umount"], ["umount", "-l"]]
        for way in ways:
            process = repository.start("mount", "--foreground", "latest", snapshot)
            wait_until(lambda: is_mounted(snapshot), "the mount")
            assert os.listdir(snapshot) == ["source"]
            output(*way, snapshot)
            result = finish(process)
            assert (result.exit, result.err) == (0, b""), way
        process = repository.start("mount", "--foreground", "latest", snapshot)
        wait_until(lambda: is_mounted(snapshot), "the mount")
        interrupt(process)
        assert finish(process).exit in (0, 130)
        assert not is_mounted(snapshot)

    def test_a_mount_whose_server_was_killed_is_explained_and_cleared(
        self, repository: Casfs, snapshot: Path
    ) -> None:
        repository.run("mount", "latest", snapshot)
        handle = os.open(snapshot / "source/pictures/photo.raw", os.O_RDONLY)
        (process,) = processes_naming(snapshot)
        os.kill(process, signal.SIGKILL)
        wait_until(lambda: not processes_naming(snapshot), "it is dead")
        attempts: list[Callable[[], object]] = [
            partial(os.listdir, snapshot),
            partial(os.pread, handle, MIB, 0),
            partial(os.open, snapshot / "source/readme.txt", os.O_RDONLY),
        ]
        for attempt in attempts:
            with pytest.raises(OSError, match=r"not connected|connection abort"):
                attempt()
        with suppress(OSError):
            os.close(handle)
        sentence = repository.refuses("mount", "latest", snapshot, mentions=["umount"])
        assert "died" in sentence
        repository.run("umount", snapshot)
        repository.run("mount", "latest", snapshot)
        repository.run("umount", snapshot)

    def test_umount_of_a_busy_mount_names_its_user(self, repository: Casfs, snapshot: Path) -> None:
        repository.run("mount", "latest", snapshot)
        user = subprocess.Popen(
            ["sh", "-c", "echo; read line"],
            cwd=snapshot / "source",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert user.stdout is not None
        user.stdout.readline()
        try:
            sentence = repository.refuses("umount", snapshot, mentions=["busy"])
            assert f"process {user.pid}" in sentence
            assert is_mounted(snapshot)
        finally:
            user.communicate(b"\n")
        repository.run("umount", snapshot)

    def test_a_mount_of_an_unprivileged_user_serves_that_user(
        self, repository: Casfs, superuser: None
    ) -> None:
        folder = Path(tempfile.mkdtemp(prefix="casfs-e2e-"))
        for name in ("home", "tree", "mount"):
            (folder / name).mkdir()
        (folder / "tree" / "file").write_bytes(b"content")
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        at = folder / "mount"
        casfs = Casfs(folder / "repository", folder / "home")
        try:
            with fuse_for_everybody(folder) as (namespace, inside):
                nobody = (*inside, "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}")
                nobody += ("--clear-groups",)
                casfs.run("init", prefix=nobody)
                casfs.run("backup", "tree", cwd=folder, prefix=nobody)
                casfs.run("mount", "latest", at, prefix=nobody)
                assert output(*nobody, "cat", at / "tree/file") == "content"
                output(*inside, "cat", at / "tree/file", expect=1)
                refused = casfs.run("mount", "--allow-other", at, expect=1, prefix=nobody)
                assert len(refused.complaints) == 1
                casfs.run("umount", at, prefix=nobody)
                assert str(at) not in Path(f"/proc/{namespace}/mountinfo").read_text()
        finally:
            forget(folder)

    def test_a_mount_without_the_kernel_cache_returns_the_same_bytes(
        self, repository: Casfs, tmp_path: Path
    ) -> None:
        data = random.Random(4).randbytes(7 * MIB)
        (tmp_path / "big").write_bytes(data)
        repository.backup("big", cwd=tmp_path)
        with mounted(repository, "--no-kernel-cache", "latest", at=tmp_path / "mount") as mount:
            for _ in range(2):
                assert (mount / "big").read_bytes() == data
            handle = os.open(mount / "big", os.O_RDONLY)
            assert os.pread(handle, 100, 5 * MIB - 50) == data[5 * MIB - 50 :][:100]
            os.close(handle)

    def test_a_mount_raises_the_read_ahead_of_the_kernel(
        self, repository: Casfs, snapshot: Path, superuser: None
    ) -> None:
        repository.run("mount", "latest", snapshot)
        device = os.stat(snapshot).st_dev
        setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        assert setting.read_text() == "1024\n"
        repository.run("umount", snapshot)

    def test_mount_refuses_invalid_options(self, repository: Casfs, snapshot: Path) -> None:
        for option in (("--owner", "1:2:3"), ("--owner", "root:root"), ("--cache-size", "-1")):
            repository.refuses("mount", *option, "latest", snapshot, expect=2)
        repository.refuses("mount", "latest", "twice", snapshot, expect=2)
        repository.refuses(
            "mount", "latest:source/readme.txt", snapshot, expect=2, mentions=["directory"]
        )
        repository.refuses("mount", "latest:no/such", snapshot, mentions=["no/such"])
        assert not is_mounted(snapshot)
