"""What the start of a command loads: a module that a command does not need costs each start of it time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import casfs

PROJECT = Path(casfs.__file__).parent.parent

SCRIPT = """
import sys
from casfs.__main__ import main
try:
    main()
finally:
    print("\\n".join(sys.modules), file=sys.stderr)
"""

LIBRARIES = {
    "asyncio",
    "casfs_mount",
    "cryptography",
    "hashlib",
    "hmac",
    "obstore",
    "pyfastcdc",
    "pyfuse3",
    "pyrage",
    "rich",
    "secrets",
    "ssl",
    "subprocess",
    "tempfile",
    "tomllib",
    "trio",
}
"""What `casfs version` does not need, nor a command that uses an unencrypted local repository."""

OTHER_COMMANDS = {
    "casfs.backup",
    "casfs.config.values",
    "casfs.crypto.key_manager",
    "casfs.maintenance",
    "casfs.patterns",
    "casfs.query",
    "casfs.repository.creation",
    "casfs.repository.presence",
    "casfs.repository.publication",
    "casfs.restore",
    "casfs.run",
    "casfs.schedule",
    "casfs.storage.remote",
    "casfs.storage.sftp",
    "casfs.store.delta_sync",
    "casfs.store.writer",
    "casfs.trees.writer",
}

FORBIDDEN = {
    "version": LIBRARIES
    | OTHER_COMMANDS
    | {"casfs.repository", "casfs.storage.base", "json", "lmdb", "msgspec", "shutil", "zstandard"},
    "snapshots": LIBRARIES | OTHER_COMMANDS,
    "backup": LIBRARIES - {"pyfastcdc"}
    | {
        "casfs.backup.file_cache",
        "casfs.backup.protection",
        "casfs.backup.stream",
        "casfs.crypto.key_manager",
        "casfs.maintenance",
        "casfs.restore",
        "casfs.storage.remote",
    },
}

NEEDED = {
    "version": "casfs.cli.commands.version",
    "snapshots": "casfs.repository.opening",
    "backup": "casfs.backup.run",
}


def loaded_by(*arguments: str) -> set[str]:
    """Run the command in a process of its own and return the modules that it has loaded at its end."""
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, check=True)
    return set(done.stderr.splitlines())


@pytest.mark.parametrize("command", FORBIDDEN)
def test_a_command_loads_no_module_that_only_others_need(command: str, tmp_path: Path) -> None:
    repository = str(tmp_path / "repository")
    loaded_by("-r", repository, "init")
    (tmp_path / "file").write_text("content")
    arguments = [str(tmp_path / "file")] if command == "backup" else []
    loaded = loaded_by("-r", repository, command, *arguments)
    assert NEEDED[command] in loaded
    assert not loaded & FORBIDDEN[command]


def test_every_module_that_a_command_must_not_load_exists() -> None:
    named = {name for names in FORBIDDEN.values() for name in names if name.startswith("casfs.")}
    for name in named:
        path = PROJECT.joinpath(*name.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), name
