"""The installed `casfs` command, run as a user runs it.

Nothing of casfs is imported: a test sees the exit code and the two streams, no more. Every run is
searched for a traceback, so that no test has to ask for that.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

Argument = str | bytes | Path

# Drops the two capabilities that let root read everything, in the program and in its children.
WITHOUT_READING_EVERYTHING: tuple[str, ...] = (
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
)


def program() -> list[str]:
    """Name the command beside this interpreter, or the module where there is no such script."""
    script = Path(sys.executable).parent / "casfs"
    return [str(script)] if script.exists() else [sys.executable, "-m", "casfs"]


@dataclass(frozen=True, slots=True)
class Result:
    """What one run of a command left behind."""

    argv: tuple[bytes, ...]
    exit: int
    out: bytes
    err: bytes

    def __str__(self) -> str:
        command = " ".join(os.fsdecode(part) for part in self.argv)
        return (
            f"{command!a}\nexit {self.exit}\nstdout: {_shorten(self.out)}\n"
            f"stderr: {_shorten(self.err)}"
        )

    @property
    def text(self) -> str:
        return os.fsdecode(self.out)

    @property
    def complaint(self) -> str:
        """Everything on stderr, as text."""
        return os.fsdecode(self.err)

    @property
    def complaints(self) -> list[str]:
        """The lines on stderr that say something."""
        return [line for line in self.complaint.splitlines() if line.strip()]

    @property
    def objects(self) -> list[dict[str, Any]]:
        """The JSON lines of stdout without the count of requests, which a repository elsewhere adds."""
        return [value for value in self.lines if value["type"] != "requests"]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The JSON lines of stdout; each must be an object that says its type."""
        found = []
        for line in self.out.splitlines():
            value = json.loads(line)
            assert isinstance(value, dict) and isinstance(value.get("type"), str), line
            found.append(value)
        return found

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [value for value in self.lines if value["type"] == kind]

    def one(self, kind: str) -> dict[str, Any]:
        """Return the only JSON line of this type."""
        found = self.of_type(kind)
        assert len(found) == 1, f"{len(found)} lines of type {kind!r}\n{self}"
        return found[0]


def _shorten(stream: bytes, most: int = 4000) -> str:
    shown = stream if len(stream) <= most else stream[:most] + b" [...]"
    return ascii(os.fsdecode(shown)).replace("\\n", "\n  ")


@dataclass(frozen=True, slots=True)
class Casfs:
    """The command together with a repository and a home of its own.

    The repository is given in CASFS_REPOSITORY, so that every verb can be run in the same way.
    """

    repository: Path | None
    home: Path

    @property
    def where(self) -> str:
        """The name of the repository, as `-r` takes it and as messages show it."""
        return str(self.repository)

    def at(self, repository: Path | None) -> Casfs:
        """Return the same command for another repository (None: for none at all)."""
        return replace(self, repository=repository)

    def beside(self, name: str) -> Casfs:
        """Return the same command for a repository that is not yet made, in a place of the same kind."""
        assert self.repository is not None
        return replace(self, repository=self.repository.with_name(name))

    def with_home(self, home: Path) -> Casfs:
        """Return the command of another host or another person with the same repository."""
        return replace(self, home=home)

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        found = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CASFS_", "XDG_", "LC_", "LANG", "GNUPG", "SSH_"))
        }
        found |= {"HOME": str(self.home), "LC_ALL": "C.UTF-8", "TZ": "UTC", "COLUMNS": "200"}
        if self.repository is not None:
            found["CASFS_REPOSITORY"] = str(self.repository)
        return found | dict(extra or {})

    def run(
        self,
        *arguments: Argument,
        expect: int | None = 0,
        stdin: bytes = b"",
        cwd: Path | None = None,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        timeout: float = 180,
    ) -> Result:
        """Run the command to its end and check its exit code (`expect=None`: any)."""
        argv = tuple(os.fsencode(part) for part in (*prefix, *program(), *arguments))
        done = subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            cwd=cwd or self.home,
            env=self.environment(env),
            timeout=timeout,
            check=False,
        )
        result = Result(argv, done.returncode, done.stdout, done.stderr)
        assert b"Traceback" not in result.out + result.err, result
        if expect is not None:
            assert result.exit == expect, f"expected exit {expect}\n{result}"
        return result

    def json(
        self,
        verb: str,
        *arguments: Argument,
        expect: int | None = 0,
        stdin: bytes = b"",
        cwd: Path | None = None,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Result:
        """Run a verb with --json; every line of its stdout must be an object with a type."""
        result = self.run(
            verb,
            "--json",
            *arguments,
            expect=expect,
            stdin=stdin,
            cwd=cwd,
            prefix=prefix,
            env=env,
        )
        assert isinstance(result.objects, list)
        return result

    def start(
        self, *arguments: Argument, cwd: Path | None = None, prefix: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """Start the command in a process group of its own, as a shell does.

        Tests that run in the background of a shell have SIGINT ignored; the command must not.
        """
        words = (*prefix, "env", "--default-signal=INT", *program(), *arguments)
        return subprocess.Popen(
            [os.fsencode(part) for part in words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd or self.home,
            env=self.environment(),
            process_group=0,
        )

    def init(self) -> Casfs:
        self.run("init")
        return self

    def backup(self, *arguments: Argument, expect: int = 0, **how: Any) -> dict[str, Any]:
        """Back up and return the `snapshot` line."""
        return self.json("backup", *arguments, expect=expect, **how).one("snapshot")

    def settled(self, pruned: dict[str, Any]) -> dict[str, Any]:
        """Return the result of a prune when what it found unneeded is removed: here that is at once."""
        return pruned

    def refuses(
        self,
        verb: str,
        *arguments: Argument,
        expect: int = 1,
        mentions: Sequence[str] = (),
        **how: Any,
    ) -> str:
        """Require that a command fails as the contract says, and return its sentence.

        It is run twice: once for people, where stderr must hold exactly one line, and once with
        --json, where stdout must end with the same sentence as an `error` line.
        """
        plain = self.run(verb, *arguments, expect=expect, **how)
        if expect != 2:  # a usage error shows the usage too
            assert len(plain.complaints) == 1, f"not one sentence\n{plain}"
        sentence = plain.complaints[-1] if plain.complaints else ""
        assert len(sentence.split()) >= 3, f"not a sentence\n{plain}"
        for word in mentions:
            assert word.lower() in sentence.lower(), f"{word!r} is not mentioned\n{plain}"
        machine = self.json(verb, *arguments, expect=expect, **how)
        error = machine.one("error")
        assert error["exit"] == expect, machine
        assert error["message"] and error["message"] in machine.complaint, machine
        return sentence


def finish(process: subprocess.Popen[bytes], timeout: float = 120) -> Result:
    """Wait for a started command and return its result, as `Casfs.run` does."""
    out, err = process.communicate(timeout=timeout)
    argv = tuple(cast(list[bytes], process.args))
    result = Result(argv, process.returncode, out, err)
    assert b"Traceback" not in out + err, result
    return result


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Do what Ctrl-C in a terminal does: SIGINT to the whole process group."""
    os.killpg(process.pid, signal.SIGINT)
