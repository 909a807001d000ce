"""A file system whose files change at an exact read: a source that no test has to race against.

The module is both sides. Run as a program it mounts the file system and takes commands, one JSON object
a line, from its standard input, with one JSON answer each. `ScriptedSource` starts that program and
talks to it.

Files are opened with direct I/O and nothing is cached, so that every read, open and stat reaches the
script. A read gives at most STEP bytes, so that even a small file is read in several steps. Time stands
still in 2020 and moves by a second with every change; a file that is `young` instead has the time of
each opening, which no change moves: a clock too coarse to show any.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyfuse3
import trio
from blake3 import blake3

STEP = 16 * 1024
_EPOCH_NS = 1_577_836_800_000_000_001
_SECOND_NS = 1_000_000_000


def content(seed: str, size: int) -> bytes:
    """Return bytes that look random and are always the same for a seed."""
    return blake3(seed.encode()).digest(length=size)


@dataclass(slots=True)
class Rule:
    """When a change happens: at which opening of the file (0: at each), in which reading of it, and where.

    The reading is 1, or 2 for a second one through the same descriptor. `where` is `before` its first
    read, `between` two reads (at the first one in the second half), or `after` the one that reached the
    end, whose reader gets what was there before.
    """

    opening: int
    reading: int
    where: str
    change: str
    seed: str = ""
    size: int = 0


@dataclass(slots=True)
class Inode:
    """A file, a directory or a FIFO; `names` are the entries of a directory."""

    number: int
    mode: int
    data: bytearray = field(default_factory=bytearray)
    names: dict[bytes, int] = field(default_factory=dict)
    nlink: int = 1
    mtime_ns: int = _EPOCH_NS
    ctime_ns: int = _EPOCH_NS
    sparse: bool = False
    young: bool = False
    size: int | None = None
    """What stat says, where that is not the truth."""
    target: bytes = b"somewhere else"
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    list_error: int = 0
    get_error: int = 0
    """Errors of listing xattrs and of reading any of them; 0 for none."""


@dataclass(slots=True)
class Script:
    """The script of one name; what stands behind the name may change, the script goes on."""

    folder: int
    name: bytes
    rules: list[Rule]
    openings: int = 0
    served: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Handle:
    """An open file: how often it has been read, and how far."""

    inode: Inode
    script: Script
    opening: int
    size: int
    reading: int = 0
    end: int = 0
    fired: set[tuple[int, str]] = field(default_factory=set)
    fails: bool = False


class ScriptedFiles(pyfuse3.Operations):
    """The file system; every method runs in the one thread of the program."""

    enable_writeback_cache = False

    def __init__(self) -> None:
        super().__init__()
        self.inodes = {1: Inode(1, stat.S_IFDIR | 0o755)}
        self.scripts: dict[int, Script] = {}
        self.handles: dict[int, Handle] = {}
        self.listed_twice: set[tuple[int, bytes]] = set()
        self._changes = 0

    def make(self, folder: int, name: bytes, mode: int) -> Inode:
        inode = Inode(max(self.inodes) + 1, mode)
        self.inodes[inode.number] = inode
        self.inodes[folder].names[name] = inode.number
        return inode

    def add_scene(self, scene: str, files: dict[str, dict[str, Any]]) -> None:
        """Make a folder with the files of a specification."""
        folder = self.make(1, scene.encode(), stat.S_IFDIR | 0o755).number
        for name, reported in files.items():
            mode = reported.get("mode", stat.S_IFREG | 0o644)
            inode = self.make(folder, os.fsencode(name), mode)
            inode.xattrs = {key.encode(): b"value" for key in reported.get("xattrs", ())}
            inode.target = os.fsencode(reported.get("target", inode.target))
            inode.list_error = reported.get("list_error", 0)
            inode.get_error = reported.get("get_error", 0)
            if reported.get("twice"):
                self.listed_twice.add((folder, os.fsencode(name)))
            if stat.S_ISDIR(mode):
                inside = self.make(inode.number, b"inside", stat.S_IFREG | 0o644)
                inside.data[:] = content(reported["seed"], reported["size"])
                self.scripts[inside.number] = Script(inode.number, b"inside", [])
                continue
            inode.data[:] = content(reported["seed"], reported["size"])
            inode.sparse = reported.get("sparse", False)
            inode.young = reported.get("young", False)
            inode.size = reported.get("stat_size")
            rules = [Rule(**rule) for rule in reported.get("rules", ())]
            self.scripts[inode.number] = Script(folder, os.fsencode(name), rules)

    def rot(self, scene: str, name: str, seed: str) -> None:
        """Change the content of a file, and nothing that stat returns."""
        folder = self.inodes[1].names[scene.encode()]
        inode = self.inodes[self.inodes[folder].names[os.fsencode(name)]]
        inode.data[:] = content(seed, len(inode.data))

    def served(self, scene: str, name: str) -> list[dict[str, Any]]:
        folder = self.inodes[1].names[scene.encode()]
        for script in self.scripts.values():
            if (script.folder, script.name) == (folder, os.fsencode(name)):
                return [
                    {
                        "opening": part["opening"],
                        "reading": part["reading"],
                        "size": part["size"],
                        "digest": part["hasher"].hexdigest(),
                    }
                    for part in script.served
                ]
        raise KeyError(name)

    def _now(self) -> int:
        self._changes += 1
        return _EPOCH_NS + self._changes * (_SECOND_NS + 1)

    def _fire(self, handle: Handle, where: str) -> None:
        if (handle.reading, where) in handle.fired:
            return
        handle.fired.add((handle.reading, where))
        for rule in handle.script.rules:
            due = rule.opening in (0, handle.opening) and rule.reading == handle.reading
            if due and rule.where == where:
                self._change(handle, rule)

    def _change(self, handle: Handle, rule: Rule) -> None:
        """Do to the file, or to its name, what a rule says."""
        inode, script = handle.inode, handle.script
        seed = f"{rule.seed}{handle.opening if rule.opening == 0 else ''}"
        now_ns = inode.ctime_ns if inode.young else self._now()
        moves_mtime = not inode.young
        match rule.change:
            case "append":
                inode.data += content(seed, rule.size)
            case "truncate":
                del inode.data[len(inode.data) // 2 :]
            case "empty":
                inode.data.clear()
            case "rewrite":
                inode.data[:] = content(seed, len(inode.data))
            case "rewrite, mtime put back":
                inode.data[:] = content(seed, len(inode.data))
                moves_mtime = False
            case "touch" | "chmod":
                moves_mtime = False
                if rule.change == "chmod":
                    inode.mode = stat.S_IFREG
            case "read error":
                handle.fails = True
                return
            case _:
                self._change_name(script, inode, rule.change, seed, rule.size)
                moves_mtime = False
        inode.ctime_ns = now_ns
        if moves_mtime:
            inode.mtime_ns = now_ns

    def _change_name(self, script: Script, inode: Inode, change: str, seed: str, size: int) -> None:
        inode.nlink = 0
        del self.inodes[script.folder].names[script.name]
        match change:
            case "unlink":
                pass
            case "rename over":
                other = self.make(script.folder, script.name, stat.S_IFREG | 0o644)
                other.data[:] = content(seed, size)
                self.scripts[other.number] = script
            case "fifo":
                self.make(script.folder, script.name, stat.S_IFIFO | 0o644)
            case "symlink":
                self.make(script.folder, script.name, stat.S_IFLNK | 0o777)
            case "directory":
                folder = self.make(script.folder, script.name, stat.S_IFDIR | 0o755)
                inside = self.make(folder.number, b"inside", stat.S_IFREG | 0o644)
                inside.data[:] = content(seed, size)
                self.scripts[inside.number] = Script(folder.number, b"inside", [])
            case _:
                raise ValueError(change)

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        number = self.inodes[parent_inode].names.get(name)
        if number is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(number, ctx)

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        found = self.inodes[inode]
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.entry_timeout = 0
        entry.attr_timeout = 0
        entry.st_mode = pyfuse3.ModeT(found.mode)
        entry.st_nlink = found.nlink
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.st_size = found.size if found.size is not None else len(found.data)
        entry.st_blocks = 1 if found.sparse else -(-len(found.data) // 512)
        entry.st_atime_ns = _EPOCH_NS
        entry.st_mtime_ns = found.mtime_ns
        entry.st_ctime_ns = found.ctime_ns
        return entry

    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self.inodes[inode].target

    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        found = self.inodes[inode]
        if found.list_error:
            raise pyfuse3.FUSEError(found.list_error)
        return list(found.xattrs)

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        found = self.inodes[inode]
        if name not in found.xattrs:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        if found.get_error:
            raise pyfuse3.FUSEError(found.get_error)
        return found.xattrs[name]

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        return pyfuse3.FileHandleT(inode)

    async def readdir(
        self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        listed = [
            item
            for item in self.inodes[fh].names.items()
            for _ in range(2 if (fh, item[0]) in self.listed_twice else 1)
        ]
        for position, (name, number) in enumerate(listed, 1):
            if position > start_id:
                entry = await self.getattr(number, pyfuse3.RequestContext())
                if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), entry, position):
                    return

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        found = self.inodes[inode]
        if not found.mode & stat.S_IRUSR:
            raise pyfuse3.FUSEError(errno.EACCES)
        script = self.scripts[inode]
        script.openings += 1
        if found.young:
            found.mtime_ns = found.ctime_ns = time.time_ns()
        number = max(self.handles, default=0) + 1
        self.handles[number] = Handle(found, script, script.openings, len(found.data))
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(number), direct_io=True)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        handle = self.handles[fh]
        if handle.reading == 0 or off < handle.end:
            handle.reading += 1
            handle.size = len(handle.inode.data)
            handle.script.served.append(
                {
                    "opening": handle.opening,
                    "reading": handle.reading,
                    "size": 0,
                    "hasher": blake3(),
                }
            )
            self._fire(handle, "before")
        elif off * 2 >= handle.size:
            self._fire(handle, "between")
        if handle.fails:
            raise pyfuse3.FUSEError(errno.EIO)
        data = bytes(handle.inode.data[off : off + min(size, STEP)])
        handle.end = off + len(data)
        part = handle.script.served[-1]
        part["hasher"].update(data)
        part["size"] += len(data)
        if off + len(data) >= handle.size or not data:
            self._fire(handle, "after")
        return data

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        del self.handles[fh]


async def _take_commands(files: ScriptedFiles) -> None:
    """Do what standard input says until it ends; then the mount goes away."""
    pending = b""
    async with trio.lowlevel.FdStream(os.dup(0)) as stream:
        async for part in stream:
            pending += part
            *lines, pending = pending.split(b"\n")
            for line in lines:
                command = json.loads(line)
                answer: Any = None
                if command["do"] == "scene":
                    files.add_scene(command["scene"], command["files"])
                elif command["do"] == "rot":
                    files.rot(command["scene"], command["file"], command["seed"])
                else:
                    answer = files.served(command["scene"], command["file"])
                print(json.dumps(answer), flush=True)
    pyfuse3.terminate()


async def _serve(files: ScriptedFiles) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_take_commands, files)
        print(json.dumps("ready"), flush=True)
        await pyfuse3.main(min_tasks=1, max_tasks=1)


def main(mountpoint: str) -> None:
    """Mount, and serve until standard input ends."""
    files = ScriptedFiles()
    options = set(pyfuse3.default_options) - {"default_permissions"}
    pyfuse3.init(files, mountpoint, options | {"fsname=scripted"})
    try:
        trio.run(_serve, files)
    finally:
        pyfuse3.close(unmount=True)


class ScriptedSource:
    """The mounted file system as a test sees it."""

    def __init__(self, mountpoint: Path, process: subprocess.Popen[str]) -> None:
        self._mountpoint = mountpoint
        self._process = process
        self._scenes = 0

    def scene(self, files: dict[str, dict[str, Any]]) -> Path:
        """Return a new folder with these files; `rules` are lists of the fields of a Rule."""
        self._scenes += 1
        name = f"scene-{self._scenes}"
        self._ask({"do": "scene", "scene": name, "files": files})
        return self._mountpoint / name

    def rot(self, file: Path, seed: str) -> None:
        """Change the content of a file, and nothing that stat returns."""
        self._ask({"do": "rot", "scene": file.parent.name, "file": file.name, "seed": seed})

    def served(self, file: Path) -> dict[tuple[int, int], tuple[str, int]]:
        """Return digest and size of what was read of a file, by opening and reading."""
        found = self._ask({"do": "served", "scene": file.parent.name, "file": file.name})
        return {
            (part["opening"], part["reading"]): (part["digest"], part["size"]) for part in found
        }

    def _ask(self, command: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the scripted source has died"
        return json.loads(line)


@contextmanager
def scripted_source(mountpoint: Path) -> Iterator[ScriptedSource]:
    """Mount the file system; it is gone afterwards, whatever happens."""
    mountpoint.mkdir()
    command: Sequence[str] = (sys.executable, __file__, str(mountpoint))
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        source = ScriptedSource(mountpoint, process)
        assert source.answer() == "ready"
        yield source
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
        for detach in (["fusermount3", "-uzq"], ["umount", "-l"]):
            if os.path.ismount(mountpoint):
                subprocess.run([*detach, str(mountpoint)], capture_output=True, check=False)


if __name__ == "__main__":
    main(sys.argv[1])
