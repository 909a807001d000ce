"""Measure how costs grow with the repository in an object storage: `python -m bench.remote.scale`.

A repository of many small blobs and 1,000 snapshots (`large_repository`) is read, added to, mounted and
pruned by new hosts, once for each number of blobs. The object storage is SeaweedFS on this machine; a proxy
counts requests and bytes. Memory is that of the process without the pages of files, which are mostly those of
its index and which the kernel can drop at any time; these are shown apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import PROJECT
from bench.measure import Child, Command, CommandError, server_pids
from bench.peers.casfs import find_program
from bench.remote.line import Line, LineSettings, LineTotals, line_to
from bench.remote.object_server import credentials, object_server
from bench.remote.trial import drop_kernel_cache
from bench.scratch import Scratch, ScratchError, unmount

BLOBS = (1_000_000, 10_000_000)
QUICK_BLOBS = (20_000, 40_000)

_BUCKET = "casfs-scale"
_LINE = LineSettings(0.0, 10_000_000_000)
_BYTES_PER_BLOB = 700
_TIMEOUT_S = 3600.0
_POLL_S = 0.02
_SOURCE_FILES, _CHANGED_FILES = 10_000, 500


@dataclass(frozen=True, slots=True)
class ScaleSample:
    """The cost of one work: peak memory without the pages of files (`own_bytes`) and with them."""

    blobs: int
    work: str
    wall_s: float
    cpu_s: float
    requests: int
    sent_bytes: int
    received_bytes: int
    own_bytes: int
    file_bytes: int

    def line(self) -> str:
        """Return the sample as a row of a table in Markdown."""
        return (
            f"| {self.work} | {self.blobs:,} | {self.wall_s:.1f} s | {self.cpu_s:.1f} s | "
            f"{self.requests:,} | "
            f"{self.sent_bytes / 1e6:.1f} MB | {self.received_bytes / 1e6:.1f} MB | "
            f"{self.own_bytes / 1e6:.0f} MB | {self.file_bytes / 1e6:.0f} MB |"
        )


HEAD = (
    "| work | blobs | wall | processor | requests | sent | received | memory | with mapped files |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


class PeakMemory:
    """Samples the memory of processes, and of their children, in a thread of its own."""

    def __init__(self, *pids: int) -> None:
        self.own_bytes = 0
        self.file_bytes = 0
        self._pids = pids
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_POLL_S):
            self.look()

    def look(self) -> None:
        """Take one sample now."""
        for pid in [*self._pids, *(child for one in self._pids for child in _children(one))]:
            self._look_at(pid)

    def _look_at(self, pid: int) -> None:
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        except OSError:
            return
        sizes = {
            name: int(value.split()[0]) * 1024
            for name, _, value in (line.partition(":") for line in status.splitlines())
            if name in ("RssAnon", "RssFile", "RssShmem")
        }
        own = sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0)
        self.own_bytes = max(self.own_bytes, own)
        self.file_bytes = max(self.file_bytes, own + sizes.get("RssFile", 0))


def _children(pid: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


class ScaleTrial:
    """The works on one repository, in their order."""

    def __init__(
        self, blobs: int, name: str, line: Line, scratch: Scratch, casfs: str, is_warm: bool
    ) -> None:
        self._blobs = blobs
        self._name = name
        self._line = line
        self._is_warm = is_warm
        self._scratch = scratch
        self._casfs = casfs
        self._home = scratch.make(f"home-{name}")
        self._log = scratch.folder / "output.log"

    def samples(self) -> Iterator[ScaleSample]:
        """Do every work and yield its cost."""
        yield self._measure("first sync of a new host", "snapshots", "--latest", "1")
        yield self._measure("`snapshots`", "snapshots")
        source = self._make_source()
        yield self._measure("first backup of 10,000 files", "backup", str(source))
        for number in range(_CHANGED_FILES):
            (source / f"{number % 100:02}" / f"{number // 100:04}").write_bytes(b"new %d" % number)
        yield self._measure("daily backup, 500 of them new", "backup", str(source))
        yield self._mount("mount of a snapshot until usable", "latest", "--host", "host-1")
        yield self._mount("mount of the repository until usable")
        yield self._measure("prune --dry-run", "prune", "--dry-run")
        self._run("forget", "--host", "host-0", "--keep-last", "1")
        yield self._measure("prune, a fifth unneeded: marks", "prune")
        yield self._measure("prune: removes", "prune", "--margin", "0s")
        yield self._measure("daily backup after that", "backup", str(source))
        self._home = self._scratch.make(f"home-{self._name}-2")
        yield self._measure("first sync after that", "snapshots", "--latest", "1")

    def _make_source(self) -> Path:
        source = self._scratch.make(f"source-{self._name}")
        for folder in range(100):
            (source / f"{folder:02}").mkdir()
            for file in range(_SOURCE_FILES // 100):
                (source / f"{folder:02}" / f"{file:04}").write_bytes(b"%d %d" % (folder, file))
        return source

    def _command(self, *arguments: str) -> Command:
        return Command(
            (self._casfs, "-r", f"s3://{_BUCKET}/{self._name}", *arguments),
            {
                **credentials(),
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._line.port}",
                "XDG_CACHE_HOME": str(self._home / "cache"),
                "XDG_STATE_HOME": str(self._home / "state"),
            },
        )

    def _begin_cold(self) -> None:
        if not self._is_warm:
            drop_kernel_cache()

    def _run(self, *arguments: str) -> None:
        with Child(self._command(*arguments), self._log) as child:
            child.wait(_TIMEOUT_S)

    def _measure(self, work: str, *arguments: str) -> ScaleSample:
        self._begin_cold()
        before, began = self._line.totals(), time.perf_counter()
        with Child(self._command(*arguments), self._log) as child, PeakMemory(child.pid) as memory:
            usage = child.wait(_TIMEOUT_S)
        return self._sample(work, before, began, memory, usage.ru_utime + usage.ru_stime)

    def _mount(self, work: str, *arguments: str) -> ScaleSample:
        """Measure until a listing of the mountpoint is there; the processor time is not known."""
        mountpoint = self._scratch.make("mount")
        self._begin_cold()
        before, began = self._line.totals(), time.perf_counter()
        try:
            self._run("mount", *arguments, str(mountpoint))
            os.listdir(mountpoint)
            with PeakMemory(*server_pids(mountpoint)) as memory:
                return self._sample(work, before, began, memory, 0.0)
        finally:
            unmount(mountpoint)
            self._scratch.remove(mountpoint)

    def _sample(
        self, work: str, before: LineTotals, began: float, memory: PeakMemory, cpu_s: float
    ) -> ScaleSample:
        wall_s = time.perf_counter() - began
        after = self._line.totals()
        memory.look()
        return ScaleSample(
            blobs=self._blobs,
            work=work,
            wall_s=wall_s,
            cpu_s=cpu_s,
            requests=after.requests - before.requests,
            sent_bytes=after.sent_bytes - before.sent_bytes,
            received_bytes=after.received_bytes - before.received_bytes,
            own_bytes=memory.own_bytes,
            file_bytes=memory.file_bytes,
        )


def make_repository(name: str, blobs: int, port: int, scratch: Scratch) -> int:
    """Write the synthetic repository; return the number of its blobs."""
    home = scratch.make(f"maker-{name}")
    environment = {
        **os.environ,
        **credentials(),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_STATE_HOME": str(home / "state"),
    }
    command = [sys.executable, "-m", "bench.remote.large_repository"]
    done = subprocess.run(
        [*command, f"s3://{_BUCKET}/{name}", str(blobs)],
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    scratch.remove(home)
    return int(done.stdout)


def measure(counts: tuple[int, ...], scratch: Scratch, output: Path, is_warm: bool = False) -> None:
    """Measure for each number of blobs, and print and save every sample at once."""
    casfs = find_program()
    if casfs is None:
        raise OSError("casfs is not installed; `make dev` installs it")
    samples: list[ScaleSample] = []
    output.mkdir(parents=True, exist_ok=True)
    print(HEAD)
    with object_server(scratch.make("server")) as server:
        server.make_bucket(_BUCKET)
        for number, count in enumerate(counts):
            blobs = make_repository(str(number), count, server.port, scratch)
            with line_to(server.port, _LINE) as line:
                trial = ScaleTrial(blobs, str(number), line, scratch, casfs, is_warm)
                for sample in trial.samples():
                    samples.append(sample)
                    print(sample.line(), flush=True)
                    found = json.dumps([asdict(one) for one in samples], indent=1)
                    (output / "scale.json").write_text(found + "\n", encoding="utf-8")


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.remote.scale", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small repositories, to try it")
    parser.add_argument("--blobs", type=_counts, metavar="N,…", help="other numbers of blobs")
    parser.add_argument(
        "--warm", action="store_true", help="keep the kernel's cache, on a machine that others use"
    )
    parser.add_argument("--output", type=Path, default=Path("bench-results/remote"), metavar="DIR")
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp/casfs-bench"), metavar="DIR")
    options = parser.parse_args()
    counts = options.blobs or (QUICK_BLOBS if options.quick else BLOBS)
    try:
        with Scratch(options.scratch) as scratch:
            scratch.need(sum(counts) * _BYTES_PER_BLOB, 100_000, "The largest repository")
            measure(counts, scratch, options.output, options.warm)
    except (ScratchError, OSError, CommandError, subprocess.CalledProcessError) as error:
        print(f"The benchmark stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
