"""``python -m bench.remote``: casfs beside restic over lines of several lengths and widths."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench import PROJECT
from bench.machine import describe_machine
from bench.peers import casfs as casfs_command
from bench.peers import restic as restic_command
from bench.remote.line import LineSettings, line_to
from bench.remote.object_server import object_server
from bench.remote.programs import RemoteCasfs, RemoteProgram, RemoteRestic
from bench.remote.results import RemoteRun, RemoteSample, RemoteWork, load_run, render_run, save_run
from bench.remote.source import make_source
from bench.remote.trial import RemoteTrial
from bench.scratch import Scratch, ScratchError

_BUCKET = "casfs-bench"
_MIB = 1024 * 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, save every sample at once, and print the report; return an exit code."""
    options = _parser().parse_args(arguments)
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    if options.report:
        print(render_run(load_run(output / "results.json")))
        return 0
    try:
        with Scratch(options.scratch) as scratch:
            failed = measure(options, scratch, output)
    except (ScratchError, OSError) as error:
        print(f"The benchmark stopped: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0


def measure(options: argparse.Namespace, scratch: Scratch, output: Path) -> bool:
    """Do all works over all lines; return whether any failed."""
    programs = find_programs(options.program, options.peers)
    source = make_source(scratch.make("source"), options.size * _MIB)
    machine = describe_machine(scratch.folder)
    with object_server(scratch.make("server")) as server:
        server.make_bucket(_BUCKET)
        result = RemoteRun(
            started=time.strftime("%Y-%m-%d"),
            machine=f"{machine.cores} cores, {machine.system}, {machine.scratch_filesystem}",
            server=server.version,
            programs={program.name: version for program, version in programs},
            source_bytes=source.total_bytes,
        )
        samples: list[RemoteSample] = []
        for settings in lines(options.round_trip, options.rate):
            for program, _ in programs:
                with line_to(server.port, settings) as line:
                    trial = RemoteTrial(program, line, settings, source, scratch)
                    for work in RemoteWork:
                        samples.append(trial.perform(work))
                        print(_progress(samples[-1]), file=sys.stderr)
                        save_run(replace(result, samples=tuple(samples)), output / "results.json")
    text = render_run(replace(result, samples=tuple(samples)))
    (output / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return any(sample.failure for sample in samples)


def lines(round_trips_ms: Sequence[int], megabits: Sequence[int]) -> list[LineSettings]:
    """Return the lines to measure."""
    return [
        LineSettings(round_trip_ms / 1000, rate * 1_000_000)
        for rate in megabits
        for round_trip_ms in round_trips_ms
    ]


def find_programs(wanted: Sequence[str], peers: Path) -> list[tuple[RemoteProgram, str]]:
    """Return the programs that are there, with their versions; raise OSError without casfs."""
    found: list[tuple[RemoteProgram, str]] = []
    casfs = casfs_command.find_program()
    if casfs is None:
        raise OSError("casfs is not installed; `make dev` installs it")
    if not wanted or "casfs" in wanted:
        found.append((RemoteCasfs(casfs, _BUCKET), _version(casfs)))
    restic = restic_command.find_program(peers)
    if restic is None:
        print("restic is missing; `python -m bench setup` installs it", file=sys.stderr)
    elif not wanted or "restic" in wanted:
        version = _version(restic)
        found.append((RemoteRestic(restic, _BUCKET), version.partition(" compiled")[0]))
    return found


def _version(program: str) -> str:
    done = subprocess.run([program, "version"], capture_output=True, text=True, check=True)
    return done.stdout.strip().partition("\n")[0]


def _progress(sample: RemoteSample) -> str:
    where = f"{sample.round_trip_ms} ms, {sample.megabits_per_s} Mbit/s, {sample.program}"
    outcome = sample.failure or f"{sample.wall_s:.2f} s, {sample.requests} requests"
    return f"{where}, {sample.work}: {outcome}"


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.remote", description=__doc__)
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="of the source")
    parser.add_argument("--round-trip", type=_numbers, default=[0, 10, 50, 100], metavar="MS,…")
    parser.add_argument("--rate", type=_numbers, default=[100, 1000], metavar="MBIT,…")
    parser.add_argument("--program", action="append", default=[], choices=("casfs", "restic"))
    parser.add_argument("--output", type=Path, default=Path("bench-results/remote"))
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp/casfs-bench"))
    parser.add_argument("--peers", type=Path, default=PROJECT / ".venv-bench", metavar="DIR")
    parser.add_argument("--report", action="store_true", help="print the last results again")
    return parser


if __name__ == "__main__":
    sys.exit(main())
