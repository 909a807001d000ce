"""Pictures of a terminal: what a user types at a prompt of a certain width, and the whole screen afterwards.

`python -m tests.support.terminal_pictures` takes the pictures in `docs/terminal.md` again. The shell is in a
mount namespace where `/srv` is the folder of the test, so that paths on the screen are always the same. That
needs root.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.waiting import wait_until

PAGE = Path(__file__).parent.parent.parent / "docs" / "terminal.md"
_PROMPT = "$ "
_ROWS = 200
_ID = re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8}(?:[0-9a-f]{4})?\b")
"""A short id, or the beginning of one that was typed."""

_CONTROL = re.compile(r"\x1b\[[0-9;]*m")

_BIND = 'umask 022 && mount --bind "$1" /srv && cd /srv/anna && shift && exec "$@"'

_HEADING = re.compile(r"## A terminal of (\d+) columns")
_BLOCK = re.compile(r"```console\n(.*?)```\n", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Picture:
    """The lines of a screen; those that begin with a prompt show what was typed."""

    lines: tuple[str, ...]

    @property
    def commands(self) -> list[str]:
        """The commands that were typed."""
        return [
            line.removeprefix(_PROMPT).strip() for line in self.lines if line.startswith(_PROMPT)
        ]

    @property
    def ids(self) -> list[str]:
        """The ids on the screen, in their order."""
        return [found for line in self.lines for found in _ID.findall(line)]

    @property
    def masked(self) -> tuple[str, ...]:
        """The lines with ids, moments, durations and stored sizes replaced by others of the same width."""
        return tuple(map(_masked, self.lines))


def _masked(line: str) -> str:
    line = _ID.sub(lambda found: "0" * len(found[0]), line)
    line = re.sub(r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\b", "0000-00-00 00:00:00", line)
    line = re.sub(r"\b\d+(?:\.\d [KM]i| )B\b", lambda size: re.sub(r"\d", "0", size[0]), line)
    line = re.sub(r"\b\d+\.\d s\b", "0.0 s", line)
    return re.sub(r"casfs \d+\.\d+\.\d+", "casfs 0.0.0", line)


def read_page(text: str) -> dict[int, list[Picture]]:
    """Return the pictures on the page by the width of their terminal, in their order."""
    found: dict[int, list[Picture]] = {}
    parts = _HEADING.split(text)
    for columns, section in zip(parts[1::2], parts[2::2], strict=True):
        found[int(columns)] = [
            Picture(tuple(block.splitlines())) for block in _BLOCK.findall(section)
        ]
    return found


class Screen:
    """A shell in a terminal of tmux, with a server of its own."""

    def __init__(self, socket: Path, columns: int, folder: Path, env: Mapping[str, str]) -> None:
        self._socket = socket
        self._ids: dict[str, str] = {}
        shell = ["unshare", "--mount", "bash", "-c", _BIND, "bind", str(folder)]
        shell += ["env", "-i", *(f"{name}={value}" for name, value in env.items())]
        # Each prompt says that the command before it has ended.
        shell += [
            f"PS1={_PROMPT}",
            f"PROMPT_COMMAND=tmux -S {shlex.quote(str(socket))} wait-for -S prompt",
        ]
        size = ("-x", str(columns), "-y", str(_ROWS))
        command = shlex.join([*shell, "bash", "--norc", "--noprofile"])
        self._tmux("-f", os.devnull, "new-session", "-d", *size, command)
        self._wait_for_prompt()

    def picture(self, shown: Picture) -> tuple[Picture, bool]:
        """Type the commands of a picture on an empty screen; return it, and whether anything has a colour.

        Ids in the commands are those of other pictures: the ids of this screen are typed in their place.
        """
        self._type("clear")
        for command in shown.commands:
            self._type(_ID.sub(lambda found: self._ids.get(found[0], found[0]), command))
        captured = self._lines()
        plain = [_CONTROL.sub("", line).rstrip() for line in captured]
        taken = Picture(tuple(plain[:-1]))
        for old, new in zip(shown.ids, taken.ids, strict=False):
            self._ids.setdefault(old[:8], new[:8])
        return taken, any(map(_CONTROL.search, captured))

    def close(self) -> None:
        """End the server of tmux."""
        self._tmux("kill-server")

    def _type(self, command: str) -> None:
        self._tmux("send-keys", "-l", command)
        self._tmux("send-keys", "Enter")
        self._wait_for_prompt()

    def _wait_for_prompt(self) -> None:
        self._tmux("wait-for", "prompt")
        # The shell writes the prompt a moment later.
        wait_until(lambda: self._lines()[-1:] == [_PROMPT.strip()], "the prompt is on the screen")

    def _lines(self) -> list[str]:
        return self._tmux("capture-pane", "-p", "-e").rstrip().splitlines()

    def _tmux(self, *words: str) -> str:
        return subprocess.run(
            ["tmux", "-S", str(self._socket), *words],
            env={"PATH": os.environ["PATH"], "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"},
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout


@contextmanager
def screen(
    folder: Path, program: str, columns: int, more: Mapping[str, str] | None = None
) -> Iterator[Screen]:
    """Yield a screen whose shell is in a folder with files to back up; `program` is casfs."""
    for name in ("home", "anna", "bin"):
        (folder / name).mkdir()
    (folder / "bin" / "casfs").symlink_to(program)
    _write_sources(folder / "anna")
    # The path of a socket is limited to about a hundred bytes.
    with tempfile.TemporaryDirectory(prefix="casfs-") as short:
        env = {
            "HOME": "/srv/home",
            "PATH": f"/srv/bin:{os.environ['PATH']}",
            "TERM": "tmux-256color",
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
            "CASFS_REPOSITORY": "/srv/disk",
        }
        opened = Screen(Path(short) / "tmux", columns, folder, {**env, **(more or {})})
        try:
            yield opened
        finally:
            opened.close()


def _write_sources(folder: Path) -> None:
    """Write files of fixed contents, modes and times; each size is shown as KiB, at any level of zstd."""
    moment_s = 1_760_000_000
    for name, size in (
        ("letters/anna.txt", 9_000),
        ("letters/thesis.odt", 300_000),
        ("letters/drafts/one.tmp", 20_000),
        ("photos/2026/beach.jpg", 240_000),
        ("photos/2026/harbour.jpg", 180_000),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(name).randbytes(size))
        path.chmod(0o640)
        moment_s += 3_600
        os.utime(path, (moment_s, moment_s))
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            path.chmod(0o755)
            os.utime(path, (moment_s, moment_s))


def take_page(text: str, program: str) -> str:
    """Return the page with all its pictures taken again."""
    parts = _HEADING.split(text)
    made = [parts[0]]
    for columns, section in zip(parts[1::2], parts[2::2], strict=True):
        with (
            tempfile.TemporaryDirectory(prefix="casfs-pictures-") as folder,
            screen(Path(folder), program, int(columns)) as opened,
        ):

            def again(block: re.Match[str], opened: Screen = opened) -> str:
                old = Picture(tuple(block[1].splitlines()))
                new, _ = opened.picture(old)
                return "```console\n" + "\n".join(new.lines) + "\n```\n"

            made += [f"## A terminal of {columns} columns", _BLOCK.sub(again, section)]
    return "".join(made)


if __name__ == "__main__":
    PAGE.write_text(
        take_page(PAGE.read_text("utf-8"), str(Path(sys.executable).parent / "casfs")), "utf-8"
    )
