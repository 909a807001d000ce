"""Run the programs in turns, so that a disturbance of the machine affects all of them.

In every repetition each work is done by one program after the other (A B C A B C). What fails is
recorded and does not end the run; a program whose first backup failed is left out of the rest of
that repetition, all of which needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from bench import PROJECT
from bench.caches import KernelCache
from bench.corpus import DAYS, Corpus, Scale, survey, touch
from bench.measure import Command, CommandError, await_calm
from bench.peers.limits import LIMIT, LimitTrial, startup_command
from bench.peers.memory_tree import LOOPS, MemoryTreeTrial
from bench.reading import measure_startup
from bench.records import CorpusFacts, Failure, Sample
from bench.scratch import Scratch
from bench.stage import Stage, TrialError
from bench.trial import BackupProgram, BackupTrial
from bench.works import MOUNTED, NO_CORPUS, Work, works_on


class Trial(Protocol):
    """One program on one corpus."""

    @property
    def name(self) -> str: ...
    def does(self, work: Work) -> bool: ...
    def perform(self, work: Work, repetition: int) -> list[Sample]: ...
    def clear(self) -> None: ...


class Recorder(Protocol):
    """Receives results and saves each of them at once."""

    def corpus(self, facts: CorpusFacts) -> None: ...
    def sample(self, sample: Sample) -> None: ...
    def failure(self, failure: Failure) -> None: ...
    def note(self, sentence: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """The works to measure; `tools` names the tools that show the limits of the machine.

    `calm_s` is how long to wait before each measurement for a machine that is otherwise idle.
    """

    corpora: tuple[Corpus, ...]
    works: frozenset[Work]
    repeat: int
    scale: Scale
    quick: bool
    tools: frozenset[str]
    calm_s: float


class Schedule:
    """Executes a plan with the installed programs."""

    def __init__(
        self,
        plan: Plan,
        programs: Sequence[BackupProgram],
        scratch: Scratch,
        recorder: Recorder,
    ) -> None:
        self._plan = plan
        self._programs = programs
        self._scratch = scratch
        self._recorder = recorder
        self._cache = KernelCache()
        self._rounds = 0

    def run(self) -> None:
        """Measure everything; raise ScratchError if there is no space."""
        if not self._cache.droppable and self._plan.works & MOUNTED:
            self._recorder.note(
                "What is read through a mount was not measured: only root can drop the kernel's "
                "cache first."
            )
        if Work.STARTUP in self._plan.works:
            self._start_up()
        for corpus in self._plan.corpora:
            works = [work for work in works_on(corpus) if work in self._plan.works]
            # Reading again is part of reading: only then is there something in the cache.
            works = [work for work in works if work is not Work.READ_AGAIN]
            if not self._cache.droppable:
                works = [work for work in works if work not in MOUNTED]
            if works:
                self._measure(corpus, works)

    def _start_up(self) -> None:
        commands = {
            each.name: each.version() for each in self._programs if not each.first_backup_only
        }
        if LIMIT in self._plan.tools:
            commands[LIMIT] = startup_command()
        for repetition in range(1, self._plan.repeat + 1):
            for name, command in commands.items():
                action = partial(self._startup_samples, name, command, repetition)
                self._attempt(NO_CORPUS, Work.STARTUP, name, repetition, action)

    def _startup_samples(self, name: str, command: Command, repetition: int) -> list[Sample]:
        usage = measure_startup(command, self._scratch.folder / "output.log")
        sample = Sample(
            corpus=NO_CORPUS,
            work=Work.STARTUP.value,
            program=name,
            repetition=repetition,
            wall_s=usage.wall_s,
            cpu_s=usage.cpu_s,
            peak_bytes=usage.peak_bytes,
            foreign_cpu_s=usage.foreign_cpu_s,
        )
        return [sample]

    def _measure(self, corpus: Corpus, works: list[Work]) -> None:
        file_bytes, files = corpus.estimate(self._plan.scale)
        # The corpus; of every program its repository, what it restored and what was copied out.
        times = 4 + 3 * len(self._programs)
        room = (times * file_bytes, times * files)
        self._scratch.need(*room, f"The corpus `{corpus.name}`")
        _say(f"making the corpus {corpus.name}")
        source = self._scratch.make("corpora", corpus.name)
        description = corpus.build(source, self._plan.scale)
        facts = survey(corpus.name, description, source)
        self._recorder.corpus(facts)
        copies = self._scratch.memory_folder(facts.file_bytes)
        stage = Stage(corpus, facts, source, self._scratch, self._cache, self._plan.quick, copies)
        trials: list[Trial] = [BackupTrial(program, stage) for program in self._programs]
        tools: list[Trial] = [LimitTrial(stage)]
        tools += [MemoryTreeTrial(name, stage) for name in LOOPS]
        trials += [tool for tool in tools if tool.name in self._plan.tools]
        for repetition in range(1, self._plan.repeat + 1):
            # As late as possible: a removal slows down the next program that creates files.
            if repetition == 1 or not self._scratch.has_room(*room):
                self._clean_up()
            failed: set[str] = set()
            for work in works:
                self._turn(stage, work, repetition, trials, failed)
        for trial in trials:
            trial.clear()
        self._scratch.discard(source)
        self._clean_up()

    def _clean_up(self) -> None:
        self._scratch.purge()
        self._cache.settle()

    def _turn(
        self,
        stage: Stage,
        work: Work,
        repetition: int,
        trials: Iterable[Trial],
        failed: set[str],
    ) -> None:
        able = [trial for trial in trials if trial.does(work) and trial.name not in failed]
        if work is Work.DAILY:
            self._days(stage, repetition, able)
            return
        self._move_on(stage, work)
        for trial in able:
            action = partial(trial.perform, work, repetition)
            done = self._attempt(stage.corpus.name, work, trial.name, repetition, action)
            if not done and work is Work.FIRST:
                failed.add(trial.name)

    def _move_on(self, stage: Stage, work: Work) -> None:
        if work is Work.REREAD:
            touch(stage.source)
        elif work in (Work.CHANGED, Work.DAILY) and stage.corpus.change is not None:
            self._rounds += 1
            stage.corpus.change(stage.source, self._rounds)
            stage.facts = survey(stage.facts.name, stage.facts.description, stage.source)

    def _days(self, stage: Stage, repetition: int, trials: Iterable[Trial]) -> None:
        living = [trial for trial in trials if isinstance(trial, BackupTrial)]
        for _ in range(DAYS):
            self._move_on(stage, Work.DAILY)
            for trial in tuple(living):
                name = stage.corpus.name
                if not self._attempt(name, Work.DAILY, trial.name, repetition, trial.live_a_day):
                    living.remove(trial)
        for trial in living:
            self._record(trial.finish_days(repetition))

    def _attempt(
        self,
        corpus: str,
        work: Work,
        program: str,
        repetition: int,
        action: Callable[[], list[Sample] | None],
    ) -> bool:
        await_calm(self._plan.calm_s)
        try:
            samples = action()
        except (CommandError, TrialError, OSError, ValueError) as error:
            _say(f"{corpus:15} {work:17} {program:13} failed: {error}")
            message = str(error).replace(str(self._scratch.folder), "SCRATCH")
            message = message.replace(f"{PROJECT}/", "")
            self._recorder.failure(Failure(corpus, work.value, program, repetition, message))
            return False
        for sample in samples or ():
            self._record(sample)
        return True

    def _record(self, sample: Sample) -> None:
        _say(
            f"{sample.corpus:15} {sample.work:17} {sample.program:13} "
            f"{sample.repetition}/{self._plan.repeat} {sample.wall_s:9.3f} s "
            f"{sample.peak_bytes / 1e6:6.0f} MB"
        )
        self._recorder.sample(sample)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
