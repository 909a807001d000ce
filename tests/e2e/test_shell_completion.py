"""Completion at real shells: the key is pressed in bash and zsh, and fish is asked for its candidates."""

from __future__ import annotations

import os
import pty
import select
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.cli import Casfs, program
from tests.support.encryption import PUBLIC

HUNG_S = 60

WRAPPER = """\
#!/bin/sh
[ -n "$_CASFS_COMPLETE" ] && exec {program} "$@"
printf 'RAN'
printf '<%s>' "$@"
echo
"""

RCS = {
    "bash": "PS1='$ '\nbind 'set enable-bracketed-paste off'\nsource {script}\necho READY\n",
    "zsh": "PS1='$ '\nautoload -Uz compinit\ncompinit -u -D\nsource {script}\necho READY\n",
}


@dataclass(frozen=True, slots=True)
class Shells:
    """A command in place of casfs that prints its arguments, and completes as casfs does."""

    casfs: Casfs
    folder: Path

    def environment(self) -> dict[str, str]:
        found = self.casfs.environment()
        return found | {"PATH": f"{self.folder}:{os.environ['PATH']}", "TERM": "dumb"}

    def script(self, shell: str) -> Path:
        path = self.folder / f"script.{shell}"
        path.write_bytes(self.casfs.run("completion", shell).out)
        return path

    def type_into(self, shell: str, typed: str) -> list[str]:
        """Type a line that holds tabs into an interactive shell; return the arguments that it gives."""
        rc = self.folder / f"rc.{shell}"
        rc.write_text(RCS[shell].format(script=shlex.quote(str(self.script(shell)))))
        quiet = ["bash", "--norc", "--noprofile", "-i"] if shell == "bash" else ["zsh", "-f", "-i"]
        terminal, shell_side = pty.openpty()
        process = subprocess.Popen(
            quiet,
            stdin=shell_side,
            stdout=shell_side,
            stderr=shell_side,
            env=self.environment(),
            cwd=self.folder,
            start_new_session=True,
        )
        os.close(shell_side)
        try:
            os.write(terminal, f". {shlex.quote(str(rc))}\n".encode())
            _read_until(terminal, b"\nREADY\r\n")
            os.write(terminal, f"{typed}\n".encode())
            shown = _read_until(terminal, b">\r\n")
        finally:
            process.kill()
            process.wait()
            os.close(terminal)
        text = shown.decode().rpartition("RAN<")[2].partition(">\r\n")[0]
        return text.split("><")

    def ask_fish(self, typed: str) -> list[str]:
        """Return the candidates of fish for a line, without their descriptions."""
        command = (
            f"source {shlex.quote(str(self.script('fish')))}; complete -C {shlex.quote(typed)}"
        )
        done = subprocess.run(
            ["fish", "--no-config", "-c", command],
            env=self.environment(),
            cwd=self.folder,
            capture_output=True,
            check=True,
        )
        return [line.partition("\t")[0] for line in done.stdout.decode().splitlines()]


def _read_until(terminal: int, end: bytes) -> bytes:
    shown = b""
    deadline = time.monotonic() + HUNG_S
    while end not in shown:
        readable, _, _ = select.select([terminal], [], [], max(deadline - time.monotonic(), 0))
        assert readable, shown
        shown += os.read(terminal, 65536)
    return shown


@pytest.fixture
def shells(repository: Casfs, tmp_path: Path) -> Shells:
    folder = tmp_path / "bin"
    folder.mkdir()
    wrapper = folder / "casfs"
    wrapper.write_text(WRAPPER.format(program=shlex.join(program())))
    wrapper.chmod(0o755)
    (folder / "letters").mkdir()
    (folder / "letters" / "to anna.txt").write_text("Dear Anna")
    (folder / "letters" / "deep").mkdir()
    (folder / "letters" / "deep" / "inside").touch()
    repository.run("backup", "letters", "--tag", "monthly", "--host", "attic", cwd=folder)
    return Shells(repository, folder)


typed_shells = pytest.mark.parametrize(
    "shell",
    [
        pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"no {name}"))
        for name in ("bash", "zsh")
    ],
)


@typed_shells
class TestTyped:
    """The completion key in an interactive shell."""

    def test_the_key_completes_commands_and_options(self, shells: Shells, shell: str) -> None:
        assert shells.type_into(shell, "casfs snap\t") == ["snapshots"]
        assert shells.type_into(shell, "casfs backup --one-f\t x") == [
            "backup",
            "--one-file-system",
            "x",
        ]

    def test_the_key_completes_paths_inside_a_snapshot(self, shells: Shells, shell: str) -> None:
        assert shells.type_into(shell, "casfs ls latest:let\tde\tin\t") == [
            "ls",
            "latest:letters/deep/inside",
        ]
        assert shells.type_into(shell, "casfs dump latest:/letters/to\t") == [
            "dump",
            "latest:/letters/to anna.txt",
        ]

    def test_the_key_completes_ids_tags_and_hosts(self, shells: Shells, shell: str) -> None:
        identity = shells.casfs.json("snapshots").one("snapshot")["id"]
        assert shells.type_into(shell, f"casfs ls {identity[:4]}\t") == ["ls", identity[:12]]
        assert shells.type_into(shell, "casfs ls --tag mon\t --host at\t latest") == [
            *("ls", "--tag", "monthly", "--host", "attic", "latest"),
        ]

    def test_the_key_still_completes_file_names(self, shells: Shells, shell: str) -> None:
        for before in ("backup", "init", "backup --exclude-file", "ls --identity"):
            words = before.split()
            assert shells.type_into(shell, f"casfs {before} lett\tto\t") == [
                *words,
                "letters/to anna.txt",
            ]
        # zsh takes back the slash that it has added when the line ends.
        completed = shells.type_into(shell, "casfs restore latest --target lett\t")
        assert [word.rstrip("/") for word in completed] == [
            *("restore", "latest", "--target", "letters"),
        ]


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish")
class TestFish:
    def test_fish_completes_as_the_other_shells_do(self, shells: Shells) -> None:
        identity = shells.casfs.json("snapshots").one("snapshot")["id"]
        assert shells.ask_fish("casfs snap") == ["snapshots"]
        assert shells.ask_fish("casfs ls latest:letters/d") == ["latest:letters/deep/"]
        assert shells.ask_fish("casfs ls ") == [identity[:12], "latest"]
        assert shells.ask_fish("casfs ls --tag mo") == ["monthly"]
        assert shells.ask_fish("casfs ls --tag=mo") == ["--tag=monthly"]
        assert shells.ask_fish("casfs backup lett") == ["letters/"]
        assert shells.ask_fish("casfs restore latest --target lett") == ["letters/"]


def test_a_completion_asks_no_passphrase_and_knows_ids_of_an_encrypted_repository(
    casfs: Casfs, source: Path
) -> None:
    casfs.run("init", "--recipient", PUBLIC)
    identity = casfs.backup(source)["id"]
    variables = {"_CASFS_COMPLETE": "bash_complete", "_CASFS_LINE": "casfs ls "}
    variables |= {"CASFS_PASSPHRASE_COMMAND": "touch asked"}
    shown = casfs.run(env=variables).text
    assert f"plain\t{identity[:12]}\t" in shown
    assert not (casfs.home / "asked").exists()


def test_a_completion_without_a_repository_has_no_candidates_and_no_message(casfs: Casfs) -> None:
    variables = {"_CASFS_COMPLETE": "bash_complete", "_CASFS_LINE": "casfs ls "}
    result = casfs.at(None).run(env=variables)
    assert (result.text.strip(), result.complaint) == ("", "")
