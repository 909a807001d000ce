"""The real files of this machine: tens of thousands, none of them made for a test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import forget
from tests.e2e.places import MakeCasfs
from tests.support.cli import Casfs
from tests.support.comparing import rsync_differences
from tests.support.mounts import mounted

pytestmark = pytest.mark.xdist_group("large real tree")

CANDIDATES = ("/usr/share", "/usr/include")


@dataclass(frozen=True, slots=True)
class Real:
    casfs: Casfs
    trees: tuple[Path, ...]
    files: int


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, make_casfs: MakeCasfs) -> Iterator[Real]:
    folder = tmp_path_factory.mktemp("real")
    (folder / "home").mkdir()
    casfs = make_casfs(folder, folder / "home").init()
    trees = tuple(Path(name) for name in CANDIDATES if os.path.isdir(name))
    assert trees, f"none of {CANDIDATES} is on this machine"
    snapshot = casfs.backup(*trees)
    yield Real(casfs, trees, snapshot["files"])
    forget(folder)


@pytest.mark.slow
@pytest.mark.fuse
@pytest.mark.timeout(600)
def test_the_large_real_tree_is_the_same_in_the_mount_and_after_a_restore(
    real: Real, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("files", real.files)
    print(f"{real.files} files below {', '.join(map(str, real.trees))}")
    with mounted(real.casfs, "latest", at=tmp_path / "mount") as mount:
        for tree in real.trees:
            assert rsync_differences(tree, mount / str(tree).lstrip("/")) == ""
        # The smaller of the trees is copied out too.
        tree = real.trees[-1]
        subprocess.run(
            ["cp", "-a", str(mount / str(tree).lstrip("/")), str(tmp_path / "copy")], check=True
        )
        assert rsync_differences(tree, tmp_path / "copy") == ""
        forget(tmp_path / "copy")
    real.casfs.run("restore", "latest", "--target", tmp_path / "target")
    for tree in real.trees:
        assert rsync_differences(tree, tmp_path / "target" / str(tree).lstrip("/")) == ""
    forget(tmp_path / "target")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_second_backup_of_the_large_real_tree_stores_next_to_nothing(real: Real) -> None:
    again = real.casfs.backup(*real.trees)
    assert again["unchanged"] == again["files"] == real.files
    assert again["new_bytes"] < 100_000
    assert real.casfs.json("check").one("summary")["ok"] is True
