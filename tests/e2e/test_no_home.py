"""Users without a home folder, and an init that fails: nothing is left where it does not belong."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support.cli import program


def run_homeless(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run casfs as a user that has no account, without HOME and XDG variables."""
    kept = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    script = (
        "import os, pwd, sys\n"
        "def nobody(*_): raise KeyError('no account')\n"
        "pwd.getpwuid = pwd.getpwnam = nobody\n"
        "from casfs.cli import main\n"
        "sys.argv = ['casfs', *sys.argv[1:]]\n"
        "sys.exit(main())\n"
    )
    python = Path(program()[0]).with_name("python3")
    return subprocess.run(
        [str(python), "-c", script, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_unencrypted_repository_works_without_a_home_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    for arguments in (["init"], ["backup", "file"], ["check", "--read-data"], ["snapshots"]):
        done = run_homeless("-r", "repository", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "~").exists()


def test_an_encrypted_repository_without_a_home_folder_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_text("secret")
    arguments = ("init", "--passphrase", "--passphrase-file", "passphrase")
    done = run_homeless("-r", "repository", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert "set HOME or XDG_" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["passphrase"]


def test_an_init_that_failed_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_text("secret")
    (tmp_path / "repository").mkdir()
    arguments = ("-r", "repository", "init", "--passphrase", "--passphrase-file", "passphrase")
    assert run_homeless(*arguments, cwd=tmp_path).returncode == 1
    assert os.listdir(tmp_path / "repository") == []
    assert run_homeless("-r", "repository", "init", cwd=tmp_path).returncode == 0
