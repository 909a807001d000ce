"""On a machine without FUSE, mount says so and everything else works."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.cli import Casfs
from tests.support.mounts import is_mounted, unmount_by_force


@pytest.fixture(autouse=True)
def snapshot(repository: Casfs, source: Path) -> None:
    repository.backup(source)
    (repository.home / "mountpoint").mkdir()


def assert_refused(repository: Casfs, *prefix: str, printed: str = "fuse") -> None:
    at = repository.home / "mountpoint"
    try:
        sentence = repository.refuses("mount", "latest", at, prefix=prefix)
        assert printed in sentence.lower(), sentence
        assert not is_mounted(at)
    finally:
        unmount_by_force(at)
    assert repository.run("ls", "latest", prefix=prefix).out


def test_mount_is_refused_because_there_is_no_device(repository: Casfs, superuser: None) -> None:
    assert_refused(
        repository,
        *("unshare", "--mount", "sh", "-ec"),
        "mount -t tmpfs none /dev"
        "; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/zero c 1 5"
        "; mknod -m 666 /dev/urandom c 1 9; mkdir -m 1777 /dev/shm"
        '; exec "$@"',
        "sh",
    )


def test_mount_is_refused_because_the_device_is_unusable(
    repository: Casfs, superuser: None
) -> None:
    assert_refused(
        repository,
        *("unshare", "--mount", "sh", "-ec", 'mount --bind /dev/null /dev/fuse; exec "$@"'),
        "sh",
    )


def test_mount_is_refused_because_pyfuse3_is_not_installed(
    repository: Casfs, tmp_path: Path
) -> None:
    (tmp_path / "shadow").mkdir()
    for module in ("pyfuse3", "trio"):
        (tmp_path / "shadow" / f"{module}.py").write_text(
            f'raise ModuleNotFoundError("No module named {module}", name="{module}")\n'
        )
    at = repository.home / "mountpoint"
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "shadow"), *_python_path()])}
    sentence = repository.refuses("mount", "latest", at, env=env)
    assert "pyfuse3" in sentence
    assert not is_mounted(at)
    for verb in (("ls", "latest"), ("check",), ("backup", ".")):
        repository.run(*verb, env=env)


def _python_path() -> list[str]:
    found = os.environ.get("PYTHONPATH")
    return [found] if found else []
