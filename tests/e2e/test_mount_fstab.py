"""`mount -t fuse.casfs`, fstab and systemd's units, on a machine that is left as it is.

mount(8) looks for its helpers in /sbin alone. So /sbin is covered, in a mount namespace of its own, with
one that has the helper too; nothing of that is seen outside.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cli import Casfs, program
from tests.support.mounts import mount_namespace

pytestmark = pytest.mark.fuse

PROJECT = Path(__file__).parent.parent.parent

Inside = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def inside(tmp_path: Path, superuser: None, repository: Casfs) -> Iterator[Inside]:
    """Run commands where mount(8) finds the helper; what they mounted goes with the namespace."""
    helper = Path(program()[0]).with_name("mount.fuse.casfs")
    assert helper.exists()
    layers = tmp_path / "layers"
    layers.mkdir()
    sbin = Path("/sbin").resolve()
    # mount(8) passes no HOME on to its helper.
    state = {"XDG_STATE_HOME": str(repository.home / ".local" / "state")}
    options = f"lowerdir={sbin},upperdir={layers}/upper,workdir={layers}/work"
    with mount_namespace() as holder:

        def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                ["nsenter", f"--mount=/proc/{holder}/ns/mnt", "--", *map(str, command)],
                env=repository.environment(state),
                capture_output=True,
                text=True,
                check=False,
            )

        for command in (
            ("mount", "-t", "tmpfs", "casfs-test", layers),
            ("mkdir", layers / "upper", layers / "work"),
            ("ln", "-s", helper, layers / "upper" / "mount.fuse.casfs"),
            ("mount", "-t", "overlay", "casfs-test", "-o", options, sbin),
        ):
            done = run(*command)
            assert done.returncode == 0, done.stderr
        yield run


@pytest.fixture
def at(repository: Casfs, source: Path, tmp_path: Path) -> Path:
    """A mountpoint, beside a repository with one snapshot."""
    repository.backup("source", cwd=tmp_path)
    (tmp_path / "at").mkdir()
    return tmp_path / "at"


class TestMountByType:
    def test_mount_by_type_mounts_a_repository(
        self, repository: Casfs, inside: Inside, at: Path
    ) -> None:
        options = "snapshot=latest:source,uid=1234,gid=5678,noexec,nofail,x-other=1"
        done = inside("mount", "-t", "fuse.casfs", repository.where, at, "-o", options)
        assert (done.returncode, done.stderr) == (0, "")
        assert inside("cat", at / "readme.txt").stdout == "read me\n"
        assert inside("stat", "-c", "%u %g", at / "readme.txt").stdout == "1234 5678\n"
        shown = inside("findmnt", "-n", "-o", "SOURCE,FSTYPE,OPTIONS", at).stdout.split()
        assert shown[:2] == [repository.where, "fuse.casfs"]
        assert {"ro", "noexec", "nosuid", "nodev"} <= set(shown[2].split(","))
        assert not (at / "readme.txt").exists(), "it is mounted in that namespace only"
        assert inside("umount", at).returncode == 0

    def test_mount_by_type_reports_errors_and_fails(
        self, repository: Casfs, inside: Inside, at: Path
    ) -> None:
        for place, options, words in (
            (at.parent / "none", "ro", "no repository"),
            (repository.where, "snapshot=abcdef", "no snapshot"),
            (repository.where, "snapshoot=latest", "unknown option snapshoot"),
        ):
            done = inside("mount", "-t", "fuse.casfs", place, at, "-o", options)
            assert done.returncode in (1, 32)
            assert words in done.stderr
            assert len(done.stderr.splitlines()) == 1

    def test_mount_all_mounts_each_fstab_entry_once(
        self, repository: Casfs, inside: Inside, at: Path, tmp_path: Path
    ) -> None:
        table = tmp_path / "fstab"
        table.write_text(f"{repository.where}  {at}  fuse.casfs  allow_other,nofail  0 0\n")
        for _ in range(2):
            done = inside("mount", "--fstab", table, "-a")
            assert (done.returncode, done.stderr) == (0, "")
        assert set(inside("ls", at).stdout.split()) >= {"ids", "snapshots", "versions"}
        assert len(inside("findmnt", "-n", "-t", "fuse.casfs").stdout.splitlines()) == 1
        assert inside("umount", at).returncode == 0
        assert inside("mount", "--fstab", table, at).returncode == 0, "by the mountpoint alone"


def documented_units() -> dict[str, str]:
    """Return the units that the README shows, by file name."""
    text = (PROJECT / "README.md").read_text()
    found = re.findall(r"```ini\n# \S*/(\S+\.(?:auto)?mount)\n(.*?)```", text, re.DOTALL)
    return dict(found)


def test_the_systemd_units_in_the_readme_are_valid(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze, which verifies units")
    units = documented_units()
    assert sorted(units) == ["mnt-backups.automount", "mnt-backups.mount"]
    for name, text in units.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in units)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
