"""``python -m bench``: measure, and write results.json, table.md and chart.svg."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from bench import PROJECT
from bench.chart import render_chart
from bench.corpus import CORPORA, FULL, QUICK, Corpus
from bench.growth import measure_growth
from bench.install import install_peers
from bench.machine import describe_machine
from bench.measure import floor_bytes
from bench.records import CorpusFacts, Failure, Run, Sample, encode_run, load_run
from bench.report import render_report
from bench.roster import PROGRAMS, Roster, call_roll
from bench.scale import measure_scale
from bench.schedule import Plan, Schedule
from bench.scratch import Scratch, ScratchError
from bench.works import Work

DEFAULT_CORPORA = ("real", "big")
DEFAULT_WORKS = frozenset(
    {
        Work.STARTUP,
        Work.FIRST,
        Work.LIST,
        Work.UNCHANGED,
        Work.MOUNT,
        Work.FIND,
        Work.READ,
        Work.READ_AGAIN,
    }
)
ACTIONS = ("run", "scale", "growth", "setup", "report")
INTERRUPTED = 130


class FileRecorder:
    """Saves a run after every measurement, so that no measurement is lost."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run = run
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def corpus(self, facts: CorpusFacts) -> None:
        """Save the description of a corpus."""
        self._keep(replace(self.run, corpora=(*self.run.corpora, facts)))

    def sample(self, sample: Sample) -> None:
        """Save a measurement."""
        self._keep(replace(self.run, samples=(*self.run.samples, sample)))

    def failure(self, failure: Failure) -> None:
        """Save a failure."""
        self._keep(replace(self.run, failures=(*self.run.failures, failure)))

    def note(self, sentence: str) -> None:
        """Save a sentence for the report."""
        self._keep(replace(self.run, notes=(*self.run.notes, sentence)))

    def finish(self) -> None:
        """Mark the run as finished."""
        machine = replace(self.run.machine, floor_bytes=floor_bytes())
        self._keep(replace(self.run, finished=True, machine=machine))

    def _keep(self, run: Run) -> None:
        self.run = run
        path = self._folder / "results.json"
        path.with_suffix(".new").write_text(encode_run(run), encoding="ascii")
        path.with_suffix(".new").replace(path)


def write_report(run: Run, folder: Path) -> None:
    """Write table.md and chart.svg beside the results, and print the table."""
    text = render_report(run)
    (folder / "table.md").write_text(text, encoding="utf-8")
    chart = render_chart(run)
    if chart:
        (folder / "chart.svg").write_text(chart, encoding="utf-8")
    print(text)
    print(f"Written to {folder}: results.json, table.md" + (", chart.svg" if chart else ""))


def measure(options: argparse.Namespace) -> int:
    """Run the benchmark and return an exit code."""
    roster = call_roll(options.peers, options.program or PROGRAMS)
    for missing in roster.missing:
        print(f"{missing.program} is missing: {missing.reason}.", file=sys.stderr)
    try:
        with Scratch(options.scratch) as scratch:
            recorder = FileRecorder(_empty_run(options, roster, scratch), options.output)
            try:
                Schedule(_plan(options), roster.programs, scratch, recorder).run()
                recorder.finish()
                code = 1 if recorder.run.failures else 0
            except KeyboardInterrupt:
                print("Interrupted; unmounting and removing the scratch files.", file=sys.stderr)
                code = INTERRUPTED
    except (ScratchError, OSError, subprocess.CalledProcessError) as error:
        print(f"The benchmark stopped: {error}", file=sys.stderr)
        return 1
    write_report(recorder.run, options.output)
    return code


def _plan(options: argparse.Namespace) -> Plan:
    names = options.corpus or DEFAULT_CORPORA
    corpora: tuple[Corpus, ...] = CORPORA
    if not options.all:
        corpora = tuple(each for each in CORPORA if each.name in names)
    works = frozenset(map(Work, options.only))
    if not works:
        thorough = options.all or options.thorough or bool(options.corpus)
        works = frozenset(Work) if thorough else DEFAULT_WORKS
    if Work.READ_AGAIN in works:
        works |= {Work.READ}
    scale = QUICK if options.quick else FULL
    tools = frozenset(options.program or PROGRAMS)
    return Plan(corpora, works, options.repeat, scale, options.quick, tools, options.calm)


def _empty_run(options: argparse.Namespace, roster: Roster, scratch: Scratch) -> Run:
    return Run(
        started=time.strftime("%Y-%m-%d %H:%M %z"),
        repeat=options.repeat,
        quick=options.quick,
        finished=False,
        machine=describe_machine(scratch.folder),
        programs=roster.facts,
        missing=roster.missing,
        corpora=(),
        samples=(),
        failures=(),
        notes=(),
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures casfs beside borg, restic and the machine's own limits. "
        "`setup` installs the peers; `report` shows the results of an earlier run again; `scale` "
        "mounts a synthetic repository with 1,000 snapshots and two million files; `growth` measures "
        "10,000 to a million files, and look-ups in an index of up to 20 million blobs.",
    )
    parser.add_argument("action", nargs="?", default="run", choices=ACTIONS)
    parser.add_argument(
        "--corpus",
        action="append",
        choices=[each.name for each in CORPORA],
        help="measure all works on this corpus; may be given again (default: a few works on "
        f"{' and '.join(DEFAULT_CORPORA)})",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        choices=[each.value for each in Work],
        metavar="WORK",
        help=f"measure only this work; may be given again: {', '.join(Work)}",
    )
    parser.add_argument(
        "--program",
        action="append",
        choices=PROGRAMS,
        help="measure only this program; may be given again",
    )
    parser.add_argument("--thorough", action="store_true", help="all works on the default corpora")
    parser.add_argument("--all", action="store_true", help="all works on all corpora; takes hours")
    parser.add_argument("--quick", action="store_true", help="tiny corpora, to try the benchmark")
    parser.add_argument("--repeat", type=_count, default=3, metavar="N", help="repetitions")
    parser.add_argument(
        "--calm",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="wait up to so long before each measurement until the machine is otherwise idle",
    )
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp/casfs-bench"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), metavar="DIR")
    parser.add_argument("--peers", type=Path, default=PROJECT / ".venv-bench", metavar="DIR")
    return parser


def main() -> int:
    """Run the command line."""
    options = _parser().parse_args()
    options.peers = options.peers.absolute()
    if options.action == "setup":
        return install_peers(options.peers)
    if options.action == "report":
        try:
            write_report(load_run(options.output / "results.json"), options.output)
        except (OSError, ValueError) as error:
            print(f"There are no results to show: {error}", file=sys.stderr)
            return 1
        return 0
    if options.action in ("scale", "growth"):
        try:
            if options.action == "growth":
                return measure_growth(options.scratch, options.output, options.quick)
            return measure_scale(options.scratch, options.quick)
        except (ScratchError, OSError, ValueError, subprocess.CalledProcessError) as error:
            print(f"The benchmark stopped: {error}", file=sys.stderr)
            return 1
    return measure(options)


if __name__ == "__main__":
    sys.exit(main())
