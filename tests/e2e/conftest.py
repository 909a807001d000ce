"""What every end-to-end test gets: a command with a home of its own, and trees to back up.

`tests.e2e.places` decides where the repository is.
"""

from __future__ import annotations

import itertools
import os
import shutil
import stat
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.places import (
    LOCAL,
    S3,
    SFTP,
    MakeCasfs,
    chosen_places,
    local_only_reason,
    places_of,
)
from tests.support import full_tree as everything
from tests.support.cli import Casfs, program
from tests.support.remote import on_s3, over_ssh
from tests.support.servers import S3Server, SshServer

PLACE = "place of the repository"
"""The property of a test's report that says where its repository was."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A source tree, and the repository that holds its one snapshot.

    `inside` is where the source lies below the root of the snapshot. Tests that share it must
    change neither the tree nor the repository.
    """

    casfs: Casfs
    source: Path
    inside: str
    left_out: dict[str, str]

    def below(self, folder: Path) -> Path:
        return folder / self.inside


def forget(folder: Path) -> None:
    """Remove a tree at once, in which directories may be unreadable even for its owner."""
    for where, directories, _ in os.walk(folder):
        for name in directories:
            path = os.path.join(where, name)
            if not stat.S_ISLNK(os.lstat(path).st_mode):
                os.chmod(path, 0o700)
    shutil.rmtree(folder)


@pytest.fixture(scope="session", autouse=True)
def installed_command() -> None:
    """Say plainly, once, that the command itself is missing."""
    done = subprocess.run([*program(), "version"], capture_output=True, check=False)
    assert done.returncode == 0, f"{program()} does not run: {done.stderr.decode()}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "place" not in metafunc.fixturenames:
        return
    places = places_of(_module_of(metafunc.module.__name__))
    if places == (LOCAL,):
        return
    slow = [pytest.param(place, marks=pytest.mark.slow) for place in places if place != LOCAL]
    params = [*([LOCAL] if LOCAL in places else []), *slow]
    metafunc.parametrize("place", params, indirect=True, scope="session")


def _module_of(name: str) -> str:
    return name.rpartition(".")[2]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = chosen_places()
    left_out = []
    for item in list(items):
        if not isinstance(item, pytest.Function) or item.path.parent != Path(__file__).parent:
            continue
        place = item.callspec.params.get("place") if hasattr(item, "callspec") else None
        if place is None:
            if chosen is not None and LOCAL not in chosen:
                left_out.append(item)
                items.remove(item)
            continue
        module = _module_of(item.module.__name__)
        item.user_properties.append((PLACE, place))
        names = [node.name for node in item.listchain() if isinstance(node, pytest.Class)]
        reason = local_only_reason(module, [*names, item.originalname])
        if place != LOCAL and reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests of each module ran in which place, and why others did not."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    reasons: dict[tuple[str, str], dict[str, int]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            place = dict(report.user_properties).get(PLACE)
            if place is None:
                continue
            row = report.nodeid.partition("::")[0].rpartition("/")[2], place
            counts.setdefault(row, Counter())[outcome] += 1
            if outcome == "skipped":
                reason = report.longrepr[2].removeprefix("Skipped: ")
                found = reasons.setdefault(row, {})
                found[reason] = found.get(reason, 0) + 1
    if not counts:
        return
    terminalreporter.section("end-to-end tests by place")
    for row in sorted(counts):
        (module, place), found = row, counts[row]
        numbers = ", ".join(f"{found[outcome]} {outcome}" for outcome in found)
        terminalreporter.line(f"{module:34} {place:6} {numbers}")
        for reason, count in sorted(reasons.get(row, {}).items()):
            terminalreporter.line(f"{'':41} {count} skipped: {reason}")


@pytest.fixture(scope="session")
def place(request: pytest.FixtureRequest) -> str:
    """Where the repository is: LOCAL, S3 or SFTP."""
    return str(getattr(request, "param", LOCAL))


_serials = itertools.count()


@pytest.fixture(scope="session")
def make_casfs(request: pytest.FixtureRequest, place: str) -> MakeCasfs:
    """Return a function that returns the command of a home, with a repository that is not yet made.

    A local repository is in a folder; one over SSH, too.
    """
    if place == S3:
        s3: S3Server = request.getfixturevalue("s3_server")
        return lambda folder, home: on_s3(s3, "casfs", f"e2e-{next(_serials)}", home)
    if place == SFTP:
        ssh: SshServer = request.getfixturevalue("ssh_server")
        return lambda folder, home: over_ssh(ssh, folder / "far", home)
    return lambda folder, home: Casfs(folder / "repository", home)


@pytest.fixture
def casfs(tmp_path: Path, make_casfs: MakeCasfs) -> Casfs:
    """The command with a repository that is named and not yet made."""
    home = tmp_path / "home"
    home.mkdir()
    return make_casfs(tmp_path, home)


@pytest.fixture
def repository(casfs: Casfs) -> Casfs:
    """The command with an empty repository."""
    return casfs.init()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small everyday tree."""
    root = tmp_path / "source"
    (root / "documents" / "letters").mkdir(parents=True)
    (root / "pictures").mkdir()
    (root / "readme.txt").write_bytes(b"read me\n")
    (root / "documents" / "report.txt").write_bytes(b"a report\n" * 1000)
    (root / "documents" / "letters" / "to-anna.txt").write_bytes(b"Dear Anna\n")
    (root / "pictures" / "photo.raw").write_bytes(bytes(range(256)) * 4096)
    (root / "link").symlink_to("documents/report.txt")
    return root


@pytest.fixture
def superuser() -> None:
    """For tests that make devices, mounts or files of other users."""
    if os.geteuid() != 0:
        pytest.skip("needs root: it makes devices, mounts or files of other users")


@pytest.fixture(scope="session")
def everything_kept(
    tmp_path_factory: pytest.TempPathFactory, make_casfs: MakeCasfs
) -> Iterator[Kept]:
    """The tree that holds everything, backed up once for all tests of this worker."""
    if os.geteuid() != 0:
        pytest.skip("needs root: the tree holds devices, other owners and capabilities")
    folder = tmp_path_factory.mktemp("everything")
    home = folder / "home"
    home.mkdir()
    source = folder / "source"
    left_out = everything.build(source)
    casfs = make_casfs(folder, home).init()
    casfs.backup(source)
    yield Kept(casfs, source, str(source).lstrip("/"), left_out)
    forget(folder)
