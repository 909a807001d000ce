"""The layers: what may import what, and that no modules import each other in a circle.

The modules are read from the file system, the order of their packages is in `LAYERS`. A new package
has no layer until it is written into that table.
"""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import casfs

PROJECT = Path(casfs.__file__).parent.parent

# From the ground up: a module imports from its own package and from lower layers. Packages of one layer do
# not know each other. `docs/architecture.md` explains the layers.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "casfs.atomic_file",
        "casfs.digest",
        "casfs.display",
        "casfs.errors",
        "casfs.interruption",
        "casfs.json_document",
        "casfs.monitor",
        "casfs.paths",
        "casfs.patterns",
        "casfs.server_process",
        "casfs.user_dirs",
        "casfs.wildmatch",
    ),
    ("casfs.storage",),
    ("casfs.format",),
    ("casfs.index",),
    ("casfs.problems", "casfs.store", "casfs.trees"),
    ("casfs.crypto",),
    ("casfs.repository",),
    ("casfs.backup",),
    ("casfs.query", "casfs.restore", "casfs.maintenance"),
    ("casfs_mount", "casfs.config"),
    ("casfs.run",),
    ("casfs.schedule",),
    ("casfs.cli",),
    ("casfs.__main__",),
)

NO_NOUNS = {"common", "helper", "helpers", "misc", "util", "utils"}


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement's one target."""

    importer: str
    target: str
    line: int
    at_start: bool
    for_types: bool

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
        for node, at_start, for_types in _statements(ast.parse(path.read_bytes())):
            found += [
                Import(name, target, node.lineno, at_start, for_types)
                for target in _targets(node, package, modules)
            ]
    return found


def _statements(
    node: ast.AST, at_start: bool = True, for_types: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_start, for_types
        in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        checks_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from _statements(child, at_start and not in_function, for_types or checks_types)


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


def layer_of(module: str, layers: Sequence[Sequence[str]]) -> tuple[int, str] | None:
    """Return the layer of a module and the entry that puts it there, None where none does."""
    for number, layer in enumerate(layers):
        for entry in layer:
            if is_below(module, entry):
                return number, entry
    return None


def upward_imports(imports: Iterable[Import], layers: Sequence[Sequence[str]]) -> list[str]:
    """Name the imports that do not lead to a lower layer or stay in their package."""
    wrong = []
    for found in imports:
        importer, target = layer_of(found.importer, layers), layer_of(found.target, layers)
        if importer is None or target is None or importer[1] == target[1]:
            continue
        if importer[0] == target[0] == 0:
            continue  # single modules, which the search for circles covers
        if importer[0] <= target[0]:
            wrong.append(f"{found}: from layer {importer[0]} to layer {target[0]}")
    return wrong


def without_layer(modules: Iterable[str], layers: Sequence[Sequence[str]]) -> list[str]:
    return [name for name in modules if name != "casfs" and layer_of(name, layers) is None]


def without_module(modules: Iterable[str], layers: Sequence[Sequence[str]]) -> list[str]:
    """Name the entries of the table for which there is no module."""
    known = set(modules)
    return [entry for layer in layers for entry in layer if entry not in known]


def circles(imports: Iterable[Import]) -> list[list[str]]:
    """Return the groups of modules that import each other, by Tarjan's algorithm (1972)."""
    targets: dict[str, set[str]] = {}
    for found in imports:
        targets.setdefault(found.importer, set()).add(found.target)
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for target in sorted(targets.get(module, ())):
            if target not in order:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], order[target])
        if low[module] == order[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for module in sorted(targets):
        if module not in order:
            visit(module)
    return groups


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
        and is_below(found.target, "casfs_mount")
        and (found.at_start or not is_below(found.importer, "casfs.cli"))
    ]


def reaching_for_the_cli(imports: Iterable[Import]) -> list[str]:
    return [
        str(found)
        for found in imports
        if is_below(found.importer, "casfs_mount") and is_below(found.target, "casfs.cli")
    ]


def without_noun(modules: Iterable[str]) -> list[str]:
    return [name for name in modules if NO_NOUNS & set(name.split("."))]


@pytest.fixture(scope="module")
def casfs_modules() -> dict[str, Path]:
    return modules_of(PROJECT, ["casfs"])


@pytest.fixture(scope="module")
def mount_modules() -> dict[str, Path]:
    return modules_of(PROJECT / "mount", ["casfs_mount"])


@pytest.fixture(scope="module")
def imports(casfs_modules: dict[str, Path], mount_modules: dict[str, Path]) -> list[Import]:
    return imports_of(casfs_modules | mount_modules)


def test_every_module_has_a_layer(
    casfs_modules: dict[str, Path], mount_modules: dict[str, Path]
) -> None:
    assert without_layer(casfs_modules | mount_modules, LAYERS) == []
    assert without_module(casfs_modules | mount_modules, LAYERS) == []
    assert len(LAYERS) == 14


def test_every_import_stays_in_its_package_or_leads_to_a_lower_layer(imports: list[Import]) -> None:
    assert upward_imports(imports, LAYERS) == []


def test_no_modules_import_each_other_in_a_circle(imports: list[Import]) -> None:
    at_start = [found for found in imports if found.at_start and not found.for_types]
    assert circles(at_start) == []


def test_the_packages_that_are_installed_are_all_there_are(
    casfs_modules: dict[str, Path], mount_modules: dict[str, Path]
) -> None:
    config = configparser.ConfigParser()
    config.read(PROJECT / "setup.cfg")
    listed = config["options"]["packages"].split()
    modules = casfs_modules | mount_modules
    assert listed == [name for name, path in modules.items() if path.name == "__init__.py"]


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
    assert importers and all(is_below(name, "casfs_mount") for name in importers), importers


@pytest.mark.parametrize("library", ["click"])
def test_what_only_the_command_line_needs_is_imported_only_there(
    library: str, imports: list[Import]
) -> None:
    importers = importers_of(library, imports)
    assert importers and all(is_below(name, "casfs.cli") for name in importers), importers


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


def test_encryption_is_not_loaded_for_an_unencrypted_repository(tmp_path: Path) -> None:
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
    return modules_of(root, ["casfs", "casfs_mount"])


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
    layers = ((), ("casfs.low", "casfs.deep"), ("casfs.top",))
    wrong = upward_imports(imports_of(modules), layers)
    assert [line.partition(" imports ")[0] for line in wrong] == [
        "casfs.deep:2",
        "casfs.deep.one:1",
        "casfs.deep.two:2",
        "casfs.low:1",
        "casfs.low:2",
        "casfs.low:3",
    ]


def test_an_import_from_a_package_of_the_same_layer_is_found(tmp_path: Path) -> None:
    modules = fake(tmp_path, {"casfs/a.py": "from casfs.b import x\n", "casfs/b.py": ""})
    assert upward_imports(imports_of(modules), ((), ("casfs.a", "casfs.b"))) == [
        "casfs.a:1 imports casfs.b: from layer 1 to layer 1"
    ]


def test_a_circle_of_imports_is_found(tmp_path: Path) -> None:
    modules = fake(
        tmp_path,
        {
            "casfs/a.py": "from casfs.b import x\n",
            "casfs/b.py": "from casfs.c import x\n",
            "casfs/c.py": "from casfs.b import x\n",
        },
    )
    assert circles(imports_of(modules)) == [["casfs.b", "casfs.c"]]


def test_a_module_without_a_layer_and_an_entry_without_a_module_are_found(tmp_path: Path) -> None:
    modules = fake(tmp_path, {"casfs/a.py": "", "casfs/b/__init__.py": "", "casfs/b/c.py": ""})
    assert without_layer(modules, (("casfs.a",),)) == ["casfs.b", "casfs.b.c"]
    assert without_layer(modules, (("casfs.a", "casfs.b"),)) == []
    assert without_module(modules, (("casfs.a", "casfs.b", "casfs.gone"),)) == ["casfs.gone"]


def test_the_mount_may_be_reached_only_from_functions_of_the_command_line(tmp_path: Path) -> None:
    lazily = "def f():\n    import casfs_mount.run\n"
    modules = fake(
        tmp_path,
        {
            "casfs/cli/lazy.py": lazily,
            "casfs/cli/early.py": "if True:\n    from casfs_mount import run\n",
            "casfs/backup.py": lazily,
            "casfs_mount/run.py": "from casfs.cli import main\n",
        },
    )
    found = imports_of(modules)
    assert reaching_for_the_mount(found) == [
        "casfs.backup:2 imports casfs_mount.run",
        "casfs.cli.early:2 imports casfs_mount.run",
    ]
    assert reaching_for_the_cli(found) == ["casfs_mount.run:1 imports casfs.cli"]


def test_a_vague_name_is_found(tmp_path: Path) -> None:
    modules = fake(tmp_path, {"casfs/long.py": "x = 1\n", "casfs/utils/x.py": "x = 1\n"})
    assert without_noun(modules) == ["casfs.utils.x"]
