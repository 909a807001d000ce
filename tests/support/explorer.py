"""An explorer of random damage to a repository between random commands.

A way is a list of moves, each a name and three numbers, so that a failing seed can be shortened. After
every move a copy of the repository is read: reading brings the index up to date, and the next command
must meet it as it is. After every move these hold:

- All returned data is as it was; a read, the mount and a restore agree.
- What could be read before a command can be read after it, except what a forget was asked to remove.
- A command succeeds, or fails with an error of casfs.
- A check that reads everything names what is lost, and nothing else.
- A backup after such a check is whole, and what it has seen again is healed in older snapshots. It is whole
  without a check, too, where all packs that there are are as they were, whatever the index says.
- In the end `repair index`, `check`, `repair snapshots`, `prune` leave a repository that a check finds
  intact.
"""

from __future__ import annotations

import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from itertools import count
from pathlib import Path
from typing import Any

from casfs.digest import digest_of
from casfs.format.pack import PACK_PREFIXES
from casfs.format.versions import DEFAULT_FORMAT
from casfs.repository.place import read_config
from casfs.storage.locks import LockMode, RepositoryLock
from tests.support.encryption import PUBLIC, SECRET
from tests.support.observation import FLAGGED, LOST, Files, look_at_source
from tests.support.process_runner import KIB, Outcome, Scene, Stage, make_scene
from tests.support.random_damage import HURTS, INDEX_HURTS, MOST, Past
from tests.support.random_moves import COMMANDS, NAMES, SHARES, SIZES, SPARSE, STEPS, Move
from tests.support.stores import noise

NO_SESSION = re.compile("^session [0-9a-f]+ is missing")

Right = set[tuple[str, str]]
"""What can be read and is as it was: (snapshot, path)."""


class Kind(Enum):
    """What is explored: encrypted with its key at hand, or with backups by a host that cannot read."""

    PLAIN = "plain"
    ENCRYPTED = "encrypted"
    CLOSED = "closed"


class Explorer:
    """One repository that goes a way; `format_` is that of a plain one."""

    def __init__(
        self,
        stage: Stage,
        folder: Path,
        kind: Kind = Kind.PLAIN,
        format_: int = DEFAULT_FORMAT,
    ) -> None:
        self.kind = kind
        self._stage = stage
        self._folder = folder
        self._homes = folder / "homes"
        if kind == Kind.PLAIN:
            self.scene: Scene = make_scene(stage, folder, format_)
            self.past = Past(self.scene.root, self.scene.root / "index")
        else:
            self._homes.mkdir()
            self.scene = Scene(stage, folder / "repository", folder / "source")
            self.scene.source.mkdir()
            indexes = [self._encrypt(home) for home in ("reader", "writer")]
            self.past = Past(self.scene.root, *indexes[: 2 if kind == Kind.CLOSED else 1])
        self.past.remember()
        self.truth: dict[str, Files] = {}
        self.seen: dict[str, Files] = {}
        self.right: Right = set()
        self.is_checked = True
        self._is_index_hurt = False
        self._may_index_be_wrong = False
        self._is_stale = False
        self._moves: dict[str, Callable[[int, int, int], None]] = {
            "edit": self.edit,
            "fill a directory": self.fill,
            "backup": self.backup,
            "backups at the same time": self.back_up_twice,
            "forget": self.forget,
            "check": self.check,
            "check structure": lambda *_: self.check_less(read_data=False),
            "check a part": lambda a, b, c: self.check_less(share=a / MOST),
            "prune": self.prune,
            "prune beside a reader": lambda a, b, c: self.prune(a, beside=LockMode.READER),
            "prune beside a writer": lambda a, b, c: self.prune(a, beside=LockMode.SHARED),
            "repair index": self.repair_index,
            "repair snapshots": self.repair_snapshots,
            "repair snapshots as they seem": lambda *_: self.repair_snapshots(read_data=False),
            "look": lambda *_: self.look("look"),
            "look through the mount": lambda *_: self.look("look_through_the_mount"),
            "restore": self.restore,
            "command": self.command,
            "killed backup": self.die_in_a_backup,
            "killed prune": self.die_in_a_prune,
            "the end": self.end,
        }

    def _encrypt(self, home: str) -> Path:
        """Make an encrypted repository, or use the one that is there; return where the index is."""
        (self._homes / home).mkdir()
        root = self.scene.root
        if not root.exists():
            arguments = ["init", "--recipient", PUBLIC]
            where = str(self._homes / home)
            reported = self._stage.act("command", root, arguments=arguments, home=where).done()
            assert reported["exit"] == 0, reported
        return self._homes / home / ".cache" / "casfs" / read_config(root).id[:32] / "index"

    def _act(
        self,
        verb: str,
        root: Path | None = None,
        fate: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> Outcome:
        """Do a verb, in an encrypted repository as the one who does that."""
        root = root or self.scene.root
        if self.kind == Kind.PLAIN:
            return self._stage.act(verb, root, fate, **arguments)
        closed = self.kind == Kind.CLOSED and verb == "backup"
        arguments |= {"secret": None if closed else SECRET}
        home = str(self._homes / ("writer" if closed else "reader"))
        arguments |= {"does": verb, "home": home}
        return self._stage.act("at_home", root, fate, **arguments)

    def go(self, way: list[Move]) -> None:
        """Make all moves of a way; a failure names the moves that led to it."""
        for number, (name, *choices) in enumerate(way):
            try:
                self.move(name, *choices)
            except AssertionError as error:
                raise AssertionError(f"move {number}, {name}: {error}\n{_shown(way)}") from error
        try:
            self.move("the end", 0, 0, 0)
        except AssertionError as error:
            raise AssertionError(f"the end: {error}\n{_shown(way)}") from error

    def move(self, name: str, *choices: int) -> None:
        """Make one move."""
        if name in HURTS:
            self.hurt(name, choices[0], choices[1])
            return
        if self._is_stale:
            self._observe()
            self.is_checked = self._is_stale = False
        self._moves[name](*choices)

    def hurt(self, name: str, which: int, where: int) -> None:
        """Do harm; what can be read then is what is there when the next verb begins."""
        self._is_stale |= HURTS[name][1](self.past, which, where)
        self._is_index_hurt |= name in INDEX_HURTS
        self._may_index_be_wrong |= name in INDEX_HURTS

    def edit(self, which: int, what: int, size: int) -> None:
        """Write or remove a file; its content is often one that was there before."""
        name = NAMES[which % len(NAMES)]
        if what % 6 == 0:
            (self.scene.source / name).unlink(missing_ok=True)
            return
        kind = SIZES[size % len(SIZES)]
        label = f"{what % 5} of {kind}"
        self.scene.write(name, label, max(kind, 0))
        if kind == SPARSE:
            # Of so many pieces that the list of them is a blob of its own.
            with (self.scene.source / name).open("r+b") as file:
                for number in range(40):
                    file.seek(number * 8 * KIB)
                    file.write(noise(f"{label}, {number % 25}", 4 * KIB))

    def fill(self, *_: int) -> None:
        """Make a directory with so many entries that its tree is split."""
        folder = self.scene.source / "folder" / "many"
        folder.mkdir(parents=True, exist_ok=True)
        last = next(
            name for name in map("x{}".format, count()) if not zlib.crc32(name.encode()) % 2048
        )
        for number in range(1024):
            (folder / f"{number:04}").touch()
        for name in (last, f"{last} and more", "y"):
            (folder / name).write_bytes(b"1")

    def backup(self, host: int, *_: int) -> None:
        shows = look_at_source(self.scene.source)
        before, seen = self.right, self.seen
        are_sound = not self.past.changed("packs")
        reported = self._back_up(self.scene.root, host)
        self.truth[reported["id"]] = shows
        self._must_keep(before)
        # What a check has marked is not known to a host that cannot read.
        knows = self.is_checked and self.kind != Kind.CLOSED
        if knows or are_sound:
            assert self.seen[reported["id"]] == shows, "a backup is not whole"
        if not knows:
            return
        stored = set(shows.values())
        for name, files in seen.items():
            for path, found in files.items():
                what = self.truth[name].get(path)
                if found == LOST and what in stored and what != "directory":
                    assert (name, path) in self.right, f"{path} in {name} was seen and not healed"

    def _back_up(self, root: Path, host: int) -> dict[str, Any]:
        name = ("here", "here", "there")[host % 3]
        source = str(self.scene.source)
        reported: dict[str, Any] = self._act("backup", root, source=source, host=name).done()
        return reported

    def back_up_twice(self, which: int, what: int, size: int) -> None:
        """Back up as two hosts do at the same time: neither sees what the other stores."""
        before = self.right
        twin = self._folder / "twin"
        shutil.copytree(self.scene.root, twin)
        homes, theirs = self._homes, self._folder / "homes of the twin"
        if homes.exists():
            shutil.copytree(homes, theirs)
        first = look_at_source(self.scene.source)
        self.truth[self._back_up(self.scene.root, which)["id"]] = first
        self.edit(which, what, size)
        second = look_at_source(self.scene.source)
        with self._other_homes(theirs):
            self.truth[self._back_up(twin, which + 1)["id"]] = second
        for folder in ("sessions", *PACK_PREFIXES, "snapshots"):
            gone = self.past.gone("packs" if folder in PACK_PREFIXES else folder)
            for path in sorted((twin / folder).rglob("*"), key=lambda p: p.stat().st_mtime_ns):
                there = self.scene.root / path.relative_to(twin)
                if path.is_file() and not there.exists() and there not in gone:
                    there.parent.mkdir(exist_ok=True)
                    shutil.copy2(path, there)
        shutil.rmtree(twin)
        self._must_keep(before)

    def die_in_a_backup(self, host: int, at: int, *_: int) -> None:
        """Be killed in a backup; it may have published what it should."""
        shows = look_at_source(self.scene.source)
        before = self.right
        source = str(self.scene.source)
        self._act("backup", fate={"at": at % STEPS}, source=source, host="here")
        for path in sorted((self.scene.root / "snapshots").iterdir()):
            self.truth.setdefault(path.name, shows)
        self._must_keep(before)

    def die_in_a_prune(self, share: int, at: int, *_: int) -> None:
        self._act("prune", fate={"at": at % STEPS}, share=SHARES[share % 3])
        self._must_keep(self.right)

    def forget(self, which: int, *_: int) -> None:
        names = sorted(self.seen, key=list(self.truth).index)
        if len(names) < 2:
            return
        name = names[which % len(names)]
        self._act("forget", ids=[name]).done()
        self._must_keep({one for one in self.right if one[0] != name})

    def check(self, *_: int) -> None:
        """Check everything; what is lost is named, and nothing is that can be read."""
        seen = self.seen
        self._judge(self._act("check").done(), seen)
        self._must_keep(self.right)
        self._judge(self._act("check").done(), self.seen)
        self.is_checked = True

    def _judge(self, found: list[dict[str, Any]], seen: dict[str, Files]) -> None:
        for name, files in seen.items():
            reported = {one["path"] for one in found if one["snapshot"] == name}
            truth = self.truth[name]
            lost = {path for path, what in truth.items() if files.get(path) != what}
            for path in lost:
                assert any(_is_above(one, path) for one in reported), (
                    f"{path} is lost, reported: {reported}"
                )
            for path in reported:
                named = [one for one in lost if _is_above(path, one)]
                assert named, f"{path} in {name} can be read, and is reported as lost: {found}"

    def check_less(self, **options: Any) -> None:
        self._act("check", **options).done()
        self._must_keep(self.right)

    def prune(self, share: int, *_: int, beside: LockMode | None = None) -> None:
        """Prune; it refuses where something is damaged, and only there.

        While another writes, an index whose bytes are damaged is left to that process.
        """
        if self._is_index_hurt:
            beside = None
        with ExitStack() as held:
            if beside is not None:
                held.enter_context(RepositoryLock.acquire(self.scene.root / "locks", "x", beside))
            outcome = self._act("prune", share=SHARES[share % 3], margin_s=3600.0)
        if outcome.error is not None:
            assert outcome.error["exit"] == 5, outcome
            if not self._is_hurt():
                # A flipped bit may make an index lose a blob without any other sign.
                assert self._may_index_be_wrong, f"nothing is lost, and {outcome.error}"
                self._must_keep(self.right)
                self.repair_index()
                self._act("prune", share=SHARES[share % 3], margin_s=3600.0).done()
        self._must_keep(self.right)

    def _is_hurt(self) -> bool:
        """Return whether anything is lost, or an object is not as it was."""
        damaged = self.past.changed("snapshots") + self.past.changed("packs")
        # One that another has replaced is not listed, and may have come back.
        is_hidden = any(path.name not in self.seen for path in self.past.there("snapshots"))
        return bool(damaged or is_hidden or self._lost())

    def _lost(self) -> Right:
        """Return the unreadable entries, as (snapshot, path)."""
        return {
            (name, path)
            for name, files in self.seen.items()
            for path, what in self.truth[name].items()
            if files.get(path) != what
        }

    def repair_index(self, *_: int) -> None:
        self._act("repair_index").done()
        self._may_index_be_wrong = False
        self._must_keep(self.right)

    def repair_snapshots(self, *_: int, read_data: bool = True) -> None:
        """Repair; what could be read is in the snapshots that take the places of others."""
        folder = self.scene.root / "snapshots"
        names = {path.name for path in folder.iterdir()}
        whole = {digest_of((folder / name).read_bytes()).hex() for name in names} & names
        reported = self._act("repair_snapshots", read_data=read_data).done()
        for name in whole - {one["id"] for one in reported}:
            assert (folder / name).exists(), f"snapshot {name} was whole, if under another name"
        new = {one["id"]: one["new_id"] for one in reported}
        listed: dict[str, Files] = self._read("look").done()
        for old, name in new.items():
            if name is None:
                continue
            truth = self.truth[old]
            for path, found in listed[name].items():
                right = found == truth.get(path)
                assert right or found.startswith(FLAGGED) or not read_data, f"{path} is {found}"
            self.truth[name] = {
                path: truth[path] if found == LOST else found
                for path, found in listed[name].items()
            }
        kept = {(new.get(name) or name, path) for name, path in self.right}
        for name, path in sorted(kept):
            assert path in listed.get(name, {}), f"{path} in {name} is dropped"
        self._must_keep({one for one in kept if one[0] in self.truth})

    def look(self, verb: str) -> None:
        """Look at the repository itself, not at a copy."""
        listed = self._verified(self._act(verb).done())
        assert self._right(listed) == self.right, f"{verb} shows something else"
        self._must_keep(self.right)

    def restore(self, which: int, *_: int) -> None:
        """Restore a snapshot: what can be read is there and the rest is named."""
        names = sorted(self.seen, key=list(self.truth).index)
        if not names:
            return
        name = names[which % len(names)]
        target = self._folder / "target"
        target.mkdir()
        reported = self._act("restore", target=str(target), snapshot=name).done()
        named = {one["path"] for one in reported["problems"] if one["kind"] != "metadata"}
        start = str(target).lstrip("/") + "/"
        restored = {
            path.removeprefix(start): what
            for path, what in look_at_source(target).items()
            if path.startswith(start)
        }
        shutil.rmtree(target)
        for path, what in self.truth[name].items():
            if (name, path) in self.right:
                what = what.removeprefix(FLAGGED)
                assert restored.get(path) == what, f"{path} can be read and was not restored"
            else:
                assert restored.get(path) in (None, "directory"), f"{path} is restored as another"
                assert any(_is_above(one, path) for one in named), (
                    f"{path} is lost, reported: {named}"
                )
        self._must_keep(self.right)

    def command(self, which: int, one: int, other: int) -> None:
        """Run the command: its exit code reports whether anything was damaged."""
        names = sorted(self.seen, key=list(self.truth).index)
        if not names or self.kind != Kind.PLAIN:
            return
        name = names[one % len(names)]
        paths = sorted(self.truth[name])
        target = self._folder / "target"
        words = {
            "one": name,
            "other": names[other % len(names)],
            "target": str(target),
            "path": paths[other % len(paths)],
        }
        line = COMMANDS[which % len(COMMANDS)].split()
        arguments = [word.format(**words) for word in line]
        self._homes.mkdir(exist_ok=True)
        reported = self._read("command", arguments=arguments, home=str(self._homes)).done()
        printed = f"{' '.join(line)} exits {reported['exit']}: {reported['err']}"
        assert "Traceback" not in reported["out"] + reported["err"], printed
        lost = {path for snapshot, path in self._lost() if snapshot == name}
        if line == ["check", "--read-data"]:
            assert reported["exit"] == (5 if self._read("check").done() else 0), printed
        elif line[0] == "restore":
            shutil.rmtree(target, ignore_errors=True)
            assert reported["exit"] == (5 if lost else 0), printed
        else:
            assert reported["exit"] in ((0, 1, 5) if self._is_hurt() else (0,)), printed

    def end(self, *_: int) -> None:
        """Follow the documented steps after damage; then everything is intact."""
        self.repair_index()
        self.check()
        self.repair_snapshots()
        outcome = self._act("prune", share=0.0)
        assert outcome.error is None, f"prune after a repair: {outcome.error}"
        self._must_keep(self.right)
        left = self._act("check").done()
        if self.kind != Kind.PLAIN:
            # Damage to its header can make a pack name a session that does not exist. Its content is
            # unknown until that session returns, so a prune keeps the pack, and a check reports it.
            left = [one for one in left if not NO_SESSION.search(one["message"])]
        assert left == [], f"a check after everything was repaired finds {left}"

    def _read(self, verb: str, **arguments: Any) -> Outcome:
        """Read a copy: reading may repair what is read."""
        copy = self._folder / "copy"
        shutil.copytree(self.scene.root, copy, ignore=shutil.ignore_patterns("reserve"))
        homes = self._folder / "homes of the copy"
        if self._homes.exists():
            shutil.copytree(self._homes, homes)
        try:
            with self._other_homes(homes):
                return self._act(verb, copy, **arguments)
        finally:
            shutil.rmtree(copy)

    @contextmanager
    def _other_homes(self, homes: Path) -> Iterator[None]:
        """Run the commands as other users, whose state these commands update."""
        own, self._homes = self._homes, homes
        try:
            yield
        finally:
            self._homes = own
            if homes.exists():
                shutil.rmtree(homes)

    def _observe(self) -> None:
        """See what can be read now."""
        self.past.remember()
        self.seen = self._verified(self._read("look").done())
        self.right = self._right(self.seen)

    def _verified(self, listed: dict[str, Files]) -> dict[str, Files]:
        for name, files in listed.items():
            assert name in self.truth, f"{name} is listed, and no command published it"
            for path, found in files.items():
                right = (LOST, self.truth[name].get(path))
                assert found in right, f"{path} in {name} is given as {found}"
        return listed

    def _right(self, listed: dict[str, Files]) -> Right:
        return {(n, p) for n, files in listed.items() for p, what in files.items() if what != LOST}

    def _must_keep(self, before: Right) -> None:
        """Require that after a verb all can be read that could be read before it."""
        self._is_index_hurt = False
        self._observe()
        lost = before - self.right
        assert not lost, f"it cost {sorted(lost)[:8]} and {len(lost)} in all"


def _is_above(reported: str | None, path: str) -> bool:
    return reported is None or reported in ("", path) or path.startswith(reported + "/")


def _shown(way: list[Move]) -> str:
    return "\n".join(f"    {move!r}," for move in way)
