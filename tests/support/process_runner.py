"""Where verbs are done by processes that can be killed, and how what they leave is judged.

`Stage` is one process that forks another for each act (see `acts`). `Scene` is a repository with its
sources and with what every published snapshot must show, whatever happens.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import casfs
from casfs.format.versions import DEFAULT_FORMAT
from casfs.repository.creation import create_repository
from tests.support.observation import Files, look_at_source
from tests.support.stores import noise, pack_paths

PROJECT = Path(casfs.__file__).parent.parent
KIB = 1 << 10

MOST_KIB = 400 * KIB
"""What no verb may take of memory for the small repositories here."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an act ended: `exit` below zero is the signal, `result` None where there was an error."""

    exit: int
    steps: list[str]
    result: Any
    error: dict[str, Any] | None
    peak_kib: int

    @property
    def was_killed(self) -> bool:
        return self.exit == -9

    def done(self) -> Any:
        """Return the result of an act that must have succeeded."""
        assert self.exit == 0, self
        assert self.error is None, self
        return self.result


class Stage:
    """The process that forks; a context that ends it. `prefix` is a command that runs it."""

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.support.killable_verbs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
        )

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def act(
        self,
        verb: str,
        root: Path,
        fate: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> Outcome:
        """Run a command; only the requested fate may kill it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        job: dict[str, Any] = {"verb": verb, "root": str(root), "fate": fate or {}}
        job["arguments"] = arguments
        print(json.dumps(job), file=self._process.stdin, flush=True)
        steps: list[str] = []
        result, error, bug = None, None, None
        for line in self._process.stdout:
            reported = json.loads(line)
            if "step" in reported:
                steps.append(reported["step"])
            elif "result" in reported:
                result = reported["result"]
            elif "error" in reported:
                error = reported
            elif "bug" in reported:
                bug = reported["bug"]
            elif "ended" in reported:
                assert bug is None, f"{verb} {arguments}: {bug}"
                expected = (0, -9) if fate is not None else (0,)
                assert reported["ended"] in expected, (
                    f"{verb} {arguments} ended by {reported['ended']}"
                )
                assert reported["peak_kib"] < MOST_KIB, (verb, arguments, reported)
                return Outcome(reported["ended"], steps, result, error, reported["peak_kib"])
        raise AssertionError("the process that forks has died")


@dataclass(slots=True)
class Scene:
    """A repository in a folder, a source beside it, and what the snapshots must show."""

    stage: Stage
    root: Path
    source: Path
    published: dict[str, Files] = field(default_factory=dict)

    def act(self, verb: str, fate: dict[str, Any] | None = None, **arguments: Any) -> Outcome:
        return self.stage.act(verb, self.root, fate, **arguments)

    def back_up(self, **arguments: Any) -> dict[str, Any]:
        """Back up to the end and remember what the snapshot must show."""
        shows = look_at_source(self.source)
        reported: dict[str, Any] = self.act("backup", source=str(self.source), **arguments).done()
        self.published[reported["id"]] = shows
        return reported

    def write(self, name: str, label: str, size: int = 12 * KIB) -> None:
        path = self.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise(label, size))

    def packs(self) -> set[str]:
        return {path.name for path in pack_paths(self.root)}

    def names(self, folder: str) -> list[str]:
        return os.listdir(self.root / folder)

    def must_be_intact(self, *maybe: Files, gone: frozenset[str] = frozenset()) -> set[str]:
        """Require that every published snapshot is as it was, and is intact without a repair.

        Snapshots that look like one of `maybe` may be there too; those in `gone` need not be. Returns
        the ids that are listed.
        """
        listed: dict[str, Files] = self.act("look").done()
        for name, shows in self.published.items():
            if name in listed or name not in gone:
                assert listed.get(name) == shows, name
        for name in listed.keys() - self.published.keys():
            assert listed[name] in maybe, "a snapshot is listed that no command published"
        damage = self.act("check").done()
        assert not damage, damage
        return set(listed)

    def must_be_tidy(self) -> None:
        """Require that no process has left anything behind that takes room."""
        assert self.names("tmp") == []
        assert self.names("locks") == []
        assert self.names("condemned") == []


def make_scene(stage: Stage, folder: Path, format_: int = DEFAULT_FORMAT) -> Scene:
    """Make an empty repository in a folder, and a source outside the disk of the repository."""
    scene = Scene(stage, folder / "repository", folder / "source")
    create_repository(scene.root, format_=format_)
    scene.source.mkdir()
    return scene


@contextmanager
def kept_as_it_is(root: Path) -> Iterator[Path]:
    """Keep a copy of a repository to which `come_back` can bring it back."""
    copy = root.with_name(root.name + " as it was")
    shutil.copytree(root, copy)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)


def come_back(copy: Path, root: Path) -> None:
    """Bring a repository back to what a copy of it was."""
    shutil.rmtree(root)
    shutil.copytree(copy, root)
