"""The arrows between the rooms of the house, and what a room may be.

What exists is read from the file system; what may import what stands in the two tables. A new
module has no place until it is written into one of them.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import casfs

PROJECT = Path(casfs.__file__).parent.parent

# From the ground up: a module imports only from floors below its own, never from its own floor.
# `name.*` is a room of several modules, which may import each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "casfs",
        "casfs.index.bitmap",
        "casfs.restore.ordered_pool",
        "casfs.digest",
        "casfs.errors",
        "casfs.monitor",
    ),
    ("casfs.display",),
    (
        "casfs.store",
        "casfs.format.codec",
        "casfs.format.config",
        "casfs.storage.locks",
        "casfs.user_dirs",
        "casfs.storage.reserve",
        "casfs.storage.local",
    ),
    ("casfs.index.lmdb_env", "casfs.format.pack", "casfs.format.key_derivation"),
    ("casfs.store.cipher", "casfs.store.pending_removal", "casfs.index.location"),
    ("casfs.index.schema",),
    ("casfs.index.index",),
    ("casfs.store.duplicates", "casfs.index.verified_packs", "casfs.index.fingerprint"),
    ("casfs.store.blob_store",),
    ("casfs.store.batch_read", "casfs.repository.index_opening", "casfs.store.writer"),
    ("casfs.format.chunker", "casfs.format.tree"),
    ("casfs.trees.content", "casfs.format.snapshot", "casfs.trees.reader"),
    ("casfs.trees.flagged", "casfs.trees.writer"),
    ("casfs.crypto", "casfs.crypto.age", "casfs.crypto.gpg"),
    ("casfs.crypto.passphrase", "casfs.crypto.recipients", "casfs.crypto.trust_state"),
    ("casfs.crypto.identities", "casfs.crypto.session_files"),
    ("casfs.crypto.keyring",),
    ("casfs.crypto.key_manager",),
    ("casfs.crypto.opening",),
    ("casfs.repository.repository",),
    ("casfs.restore.prefetch", "casfs.backup.sources", "casfs.restore.target_fs"),
    ("casfs.restore.filling",),
    ("casfs.restore.entry_writer",),
    (
        "casfs.backup",
        "casfs.backup.exclude",
        "casfs.backup.reflink",
        "casfs.backup.file_cache",
        "casfs.backup.parent",
        "casfs.backup.source_reader",
        "casfs.backup.source_fs",
    ),
    ("casfs.backup.witness", "casfs.problems"),
    ("casfs.backup.capture",),
    ("casfs.backup.walker",),
    ("casfs.backup.final_retry",),
    ("casfs.backup.run",),
    ("casfs.maintenance", "casfs.maintenance.durations"),
    ("casfs.repository.used_blobs",),
    (
        "casfs.maintenance.misplaced",
        "casfs.maintenance.evacuate",
        "casfs.maintenance.retention",
        "casfs.maintenance.scrub",
        "casfs.maintenance.sessions",
    ),
    (
        "casfs.maintenance.check",
        "casfs.maintenance.forget",
        "casfs.maintenance.prune",
        "casfs.maintenance.storage_check",
    ),
    ("casfs.maintenance.repair",),
    (
        "casfs.query.diff",
        "casfs.query.find",
        "casfs.restore.restorer",
        "casfs.query.stats",
        "casfs.repository.tagging",
        "casfs.restore.tar",
        "casfs.query.history",
    ),
    ("casfs.cli.*",),
    ("casfs.__main__",),
)

# The mount stands on casfs, but for its command line, and has floors of its own.
MOUNT_FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "mount",
        "casfs_mount.daemon",
        "casfs_mount.damage_log",
        "casfs_mount.background",
        "casfs_mount.labels",
        "casfs_mount.mountpoint",
        "casfs_mount.event_loop_guard",
    ),
    (
        "casfs_mount.blob_reader",
        "casfs_mount.chunk_cache",
        "casfs_mount.extents",
        "casfs_mount.tree_cache",
        "casfs_mount.report_files",
    ),
    ("casfs_mount.inodes", "casfs_mount.file_reader"),
    ("casfs_mount.prefetch", "casfs_mount.versions_view"),
    ("casfs_mount.view",),
    ("casfs_mount.repository_view",),
    ("casfs_mount.handlers",),
    ("casfs_mount.server",),
)

MOST_LINES = 500
NO_NOUNS = {"common", "helper", "helpers", "misc", "util", "utils"}


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement's one target."""

    importer: str
    target: str
    line: int
    at_start: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def modules_of(root: Path, packages: Iterable[str]) -> dict[str, Path]:
    """Find every module below a folder by its dotted name."""
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(modules: Mapping[str, Path]) -> list[Import]:
    """Read the imports of the modules, wherever in a module they stand."""
    found = []
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node, at_start in _statements(ast.parse(path.read_bytes())):
            found += [
                Import(name, target, node.lineno, at_start)
                for target in _targets(node, package, modules)
            ]
    return found


def _statements(
    node: ast.AST, at_start: bool = True
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_start
        in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _statements(child, at_start and not in_function)


def _targets(
    node: ast.Import | ast.ImportFrom, package: str, modules: Mapping[str, Path]
) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        above = package.split(".")[: len(package.split(".")) + 1 - node.level]
        base = ".".join([*above, *([node.module] if node.module else [])])
    names = [f"{base}.{alias.name}" for alias in node.names]
    return [name if name in modules else base for name in names]


def room_of(module: str, floors: Sequence[Sequence[str]]) -> tuple[int, str] | None:
    """Look up the floor and the room of a module, None where it has none."""
    for number, floor in enumerate(floors):
        for room in floor:
            whole = room.removesuffix(".*")
            if module == whole or (room != whole and module.startswith(f"{whole}.")):
                return number, room
    return None


def wrong_arrows(imports: Iterable[Import], floors: Sequence[Sequence[str]]) -> list[str]:
    """Name the imports among the modules of a table that do not lead down."""
    wrong = []
    for found in imports:
        importer, target = room_of(found.importer, floors), room_of(found.target, floors)
        if importer is None or target is None or importer[1] == target[1]:
            continue
        if importer[0] <= target[0]:
            wrong.append(f"{found}: from floor {importer[0]} to floor {target[0]}")
    return wrong


def without_floor(modules: Iterable[str], floors: Sequence[Sequence[str]]) -> list[str]:
    return [name for name in modules if room_of(name, floors) is None]


def without_module(modules: Iterable[str], floors: Sequence[Sequence[str]]) -> list[str]:
    """Name the rooms of a table that no module stands for."""
    known = set(modules)
    return [room for floor in floors for room in floor if room.removesuffix(".*") not in known]


def is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def importers_of(package: str, imports: Iterable[Import]) -> set[str]:
    return {found.importer for found in imports if is_below(found.target, package)}


def reaching_for_the_mount(imports: Iterable[Import]) -> list[str]:
    """Name the imports of `mount` in casfs, but for those in functions of its command line."""
    return [
        str(found)
        for found in imports
        if is_below(found.importer, "casfs")
        and is_below(found.target, "mount")
        and (found.at_start or not is_below(found.importer, "casfs.cli"))
    ]


def reaching_for_the_cli(imports: Iterable[Import]) -> list[str]:
    return [
        str(found)
        for found in imports
        if is_below(found.importer, "mount") and is_below(found.target, "casfs.cli")
    ]


def too_long(modules: Mapping[str, Path]) -> list[str]:
    lengths = {name: path.read_bytes().count(b"\n") for name, path in modules.items()}
    return [f"{name}: {lines} lines" for name, lines in lengths.items() if lines > MOST_LINES]


def without_noun(modules: Iterable[str]) -> list[str]:
    return [name for name in modules if NO_NOUNS & set(name.split("."))]


@pytest.fixture(scope="module")
def casfs_modules() -> dict[str, Path]:
    return modules_of(PROJECT, ["casfs"])


@pytest.fixture(scope="module")
def mount_modules() -> dict[str, Path]:
    return modules_of(PROJECT, ["mount"])


@pytest.fixture(scope="module")
def imports(casfs_modules: dict[str, Path], mount_modules: dict[str, Path]) -> list[Import]:
    return imports_of(casfs_modules | mount_modules)


def test_every_module_of_casfs_has_a_floor(casfs_modules: dict[str, Path]) -> None:
    assert without_floor(casfs_modules, FLOORS) == []
    assert without_module(casfs_modules, FLOORS) == []


def test_every_module_of_the_mount_has_a_floor(mount_modules: dict[str, Path]) -> None:
    assert without_floor(mount_modules, MOUNT_FLOORS) == []
    assert without_module(mount_modules, MOUNT_FLOORS) == []


def test_every_import_inside_casfs_leads_down(imports: list[Import]) -> None:
    assert wrong_arrows(imports, FLOORS) == []


def test_every_import_inside_the_mount_leads_down(imports: list[Import]) -> None:
    assert wrong_arrows(imports, MOUNT_FLOORS) == []


def test_casfs_reaches_for_the_mount_only_when_a_command_asks(imports: list[Import]) -> None:
    assert reaching_for_the_mount(imports) == []


def test_the_mount_knows_nothing_of_the_command_line(imports: list[Import]) -> None:
    assert reaching_for_the_cli(imports) == []


def test_exactly_one_module_imports_lmdb(imports: list[Import]) -> None:
    assert importers_of("lmdb", imports) == {"casfs.index.lmdb_env"}


@pytest.mark.parametrize("library", ["pyfuse3", "trio"])
def test_what_only_the_mount_needs_is_imported_only_there(
    library: str, imports: list[Import]
) -> None:
    importers = importers_of(library, imports)
    assert importers and all(is_below(name, "mount") for name in importers), importers


@pytest.mark.parametrize("library", ["click", "rich"])
def test_what_only_the_command_line_needs_is_imported_only_there(
    library: str, imports: list[Import]
) -> None:
    importers = importers_of(library, imports)
    assert importers and all(is_below(name, "casfs.cli") for name in importers), importers


def test_no_module_is_longer_than_a_room_may_be(
    casfs_modules: dict[str, Path], mount_modules: dict[str, Path]
) -> None:
    assert too_long(casfs_modules | mount_modules) == []


def test_every_module_is_named_by_a_noun_of_its_own(
    casfs_modules: dict[str, Path], mount_modules: dict[str, Path]
) -> None:
    assert without_noun(casfs_modules | mount_modules) == []


WITHOUT_FUSE = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pyfuse3", "trio"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=PROJECT, check=False
    )


def test_all_of_casfs_can_be_imported_where_there_is_no_fuse(
    casfs_modules: dict[str, Path],
) -> None:
    names = [name for name in casfs_modules if name != "casfs.__main__"]
    assert {"casfs", "casfs.cli"} <= set(names)
    done = run_python("-c", WITHOUT_FUSE, *names)
    assert done.returncode == 0, done.stderr
    blocked = run_python("-c", WITHOUT_FUSE, "trio")
    assert "No module named 'trio'" in blocked.stderr


def test_the_version_is_said_without_loading_what_draws_or_mounts() -> None:
    done = run_python("-X", "importtime", "-m", "casfs", "version")
    assert done.returncode == 0, done.stderr
    assert casfs.__version__ in done.stdout
    lines = done.stderr.splitlines()
    loaded = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "casfs.cli" in loaded
    assert not loaded & {"rich", "pyfuse3", "trio", "mount", "cryptography", "pyrage"}


def test_what_encrypts_is_not_loaded_for_a_repository_that_is_not_encrypted(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom casfs.cli.app import run\n"
        "assert run(sys.argv[1:]) == 0\n"
        "print(sorted({'cryptography', 'pyrage'} & set(sys.modules)))\n"
    )
    root = str(tmp_path / "repository")
    (tmp_path / "file").write_text("content")
    for arguments in (["init"], ["backup", str(tmp_path / "file")], ["ls", "latest"]):
        done = run_python("-c", script, "-r", root, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"


def fake(root: Path, files: Mapping[str, str]) -> dict[str, Path]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return modules_of(root, ["casfs", "mount"])


def test_an_import_that_leads_up_is_found_in_all_its_forms(tmp_path: Path) -> None:
    modules = fake(
        tmp_path,
        {
            "casfs/__init__.py": "",
            "casfs/top.py": "import casfs.low\n",
            "casfs/low.py": "import casfs.top\nfrom casfs import top\nfrom casfs.top import x\n",
            "casfs/deep/__init__.py": "from . import one\nfrom .. import top\n",
            "casfs/deep/one.py": "from ..top import x\nfrom .two import y\n",
            "casfs/deep/two.py": "def f():\n    from casfs import top\n",
        },
    )
    floors = (("casfs",), ("casfs.low", "casfs.deep.*"), ("casfs.top",))
    wrong = wrong_arrows(imports_of(modules), floors)
    assert [line.partition(" imports ")[0] for line in wrong] == [
        "casfs.deep:2",
        "casfs.deep.one:1",
        "casfs.deep.two:2",
        "casfs.low:1",
        "casfs.low:2",
        "casfs.low:3",
    ]


def test_an_import_from_the_same_floor_is_found(tmp_path: Path) -> None:
    modules = fake(tmp_path, {"casfs/a.py": "from casfs.b import x\n", "casfs/b.py": ""})
    assert wrong_arrows(imports_of(modules), (("casfs.a", "casfs.b"),)) == [
        "casfs.a:1 imports casfs.b: from floor 0 to floor 0"
    ]


def test_a_module_without_a_floor_and_a_floor_without_a_module_are_found(tmp_path: Path) -> None:
    modules = fake(tmp_path, {"casfs/a.py": "", "casfs/b/__init__.py": "", "casfs/b/c.py": ""})
    assert without_floor(modules, (("casfs.a", "casfs.b"),)) == ["casfs.b.c"]
    assert without_floor(modules, (("casfs.a", "casfs.b.*"),)) == []
    assert without_module(modules, (("casfs.a", "casfs.b.*", "casfs.gone"),)) == ["casfs.gone"]


def test_the_mount_may_be_reached_only_from_functions_of_the_command_line(tmp_path: Path) -> None:
    lazily = "def f():\n    import mount.run\n"
    modules = fake(
        tmp_path,
        {
            "casfs/cli/lazy.py": lazily,
            "casfs/cli/early.py": "if True:\n    from mount import run\n",
            "casfs/backup.py": lazily,
            "mount/run.py": "from casfs.cli import main\n",
        },
    )
    found = imports_of(modules)
    assert reaching_for_the_mount(found) == [
        "casfs.backup:2 imports mount.run",
        "casfs.cli.early:2 imports mount.run",
    ]
    assert reaching_for_the_cli(found) == ["mount.run:1 imports casfs.cli"]


def test_a_long_module_and_a_vague_name_are_found(tmp_path: Path) -> None:
    modules = fake(
        tmp_path, {"casfs/long.py": "x = 1\n" * 501, "casfs/utils/x.py": "x = 1\n" * 500}
    )
    assert too_long(modules) == ["casfs.long: 501 lines"]
    assert without_noun(modules) == ["casfs.utils.x"]
