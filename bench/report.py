"""Format a run as Markdown: medians with their spread, ratios, and the aims with their outcomes.

Nothing is shown that was not measured: what is missing or failed has its own sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.aims import AIMS, CASFS, Aim, aims_for
from bench.corpus import CORPORA
from bench.peers.limits import LIMIT, STARTUP_LIMIT, limit_label
from bench.records import CorpusFacts, Run, Sample, Spread, spread
from bench.works import BACKUPS, LABELS, NO_CORPUS, Work

BUSY_SHARE = 0.15
SINGLE = frozenset(each.name for each in CORPORA if each.single is not None)


def render_report(run: Run) -> str:
    """Return the whole report."""
    parts = [_introduction(run)]
    parts += [_corpus_part(run, facts) for facts in run.corpora]
    parts += [_startup_part(run), _aims_part(run), _faults_part(run)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(run: Run) -> str:
    machine = run.machine
    lines = [
        f"Measured {run.started} on {machine.cores} cores ({machine.processor}), "
        f"{machine.memory_bytes / 1e9:.0f} GB of memory, {machine.system}, kernel "
        f"{machine.kernel}, Python {machine.python}; everything on {machine.scratch_filesystem}."
    ]
    versions = [each.version for each in run.programs if each.version]
    if versions:
        lines.append("Programs: " + "; ".join(dict.fromkeys(versions)) + ".")
    lines += [f"**Missing: {each.program}**, {each.reason}." for each in run.missing]
    if not run.finished:
        lines.append("**The run was not finished**: this is what it had measured until then.")
    if run.quick:
        lines.append("**A quick run on small corpora**: its numbers mean nothing.")
    lines += run.notes
    times = "once" if run.repeat == 1 else f"{run.repeat} times, the programs in turns"
    lines.append(
        f"Each work was done {times}; shown is the median (least–greatest). The number in bold "
        "is casfs's time divided by that program's. Durable writes are on in every backup "
        "program, as they come; the ordinary tools do not wait for the disk. restic always "
        "encrypts, the others do not. *Cold* means that the kernel's cache was dropped before "
        "the mount and again before the measurement; everything else has its source and its "
        "repository in that cache."
    )
    return "\n\n".join(lines)


def _corpus_part(run: Run, facts: CorpusFacts) -> str:
    programs = _programs_on(run, facts.name)
    works = [work for work in Work if any(run.select(facts.name, work, p) for p in programs)]
    if not works:
        return ""
    size = _bytes_text(facts.file_bytes)
    files = "1 file" if facts.files == 1 else f"{facts.files:,} files"
    title = f"### `{facts.name}`: {files}, {size}\n\n{_capital(facts.description)}."
    labels = [_label(run, program) for program in programs]
    time_rows = [
        [
            LABELS[work],
            *(_time_cell(run, facts.name, work, program) for program in programs),
            _verdicts(run, aims_for(facts.name, work, "time") + aims_for(facts.name, work, "rate")),
        ]
        for work in works
    ]
    cost_programs = [each for each in programs if each != LIMIT]
    cost_rows = [
        [
            LABELS[work],
            *(_cost_cell(run, facts.name, work, program) for program in cost_programs),
            _verdicts(run, aims_for(facts.name, work, "peak memory")),
        ]
        for work in works
    ]
    parts = [
        title,
        _table(["wall time", *labels, "aims"], time_rows),
        _table(
            ["processor time, peak memory", *(_label(run, each) for each in cost_programs), "aims"],
            cost_rows,
        ),
        _stored_table(run, facts.name, works, cost_programs),
    ]
    return "\n\n".join(part for part in parts if part)


def _stored_table(run: Run, corpus: str, works: Sequence[Work], programs: Sequence[str]) -> str:
    rows = []
    for work in works:
        if work not in BACKUPS:
            continue
        cells = []
        for program in programs:
            samples = run.select(corpus, work, program)
            stored = spread(each.stored_bytes for each in samples if each.stored_bytes is not None)
            grown = spread(each.grown_bytes for each in samples if each.grown_bytes is not None)
            cells.append(
                _bytes_text(stored.median)
                if stored is not None
                else f"{_bytes_text(grown.median, '+')}"
                if grown is not None
                else ""
            )
        aims = aims_for(corpus, work, "stored size") + aims_for(corpus, work, "growth")
        rows.append([LABELS[work], *cells, _verdicts(run, aims)])
    if not any(any(row[1:-1]) for row in rows):
        return ""
    labels = [_label(run, program) for program in programs]
    return _table(["stored in the repository", *labels, "aims"], rows)


def _startup_part(run: Run) -> str:
    programs = _programs_on(run, NO_CORPUS)
    if not programs:
        return ""
    labels = [STARTUP_LIMIT if each == LIMIT else _label(run, each) for each in programs]
    cells = []
    for program in programs:
        wall = run.wall(NO_CORPUS, Work.STARTUP, program)
        cells.append("" if wall is None else _spread_text(wall))
    verdicts = _verdicts(run, aims_for(NO_CORPUS, Work.STARTUP, "time"))
    row = [LABELS[Work.STARTUP], *cells, verdicts]
    return "### Start-up\n\n" + _table(["wall time", *labels, "aims"], [row])


def _aims_part(run: Run) -> str:
    measured = {facts.name for facts in run.corpora} | {NO_CORPUS}
    rows = [
        [
            aim.group,
            "" if aim.corpus == NO_CORPUS else f"`{aim.corpus}`",
            f"{LABELS[aim.work]}: {aim.text}",
            aim.bound_text,
            aim.value_text(run),
            aim.outcome(run).value,
        ]
        for aim in AIMS
        if aim.corpus in measured
    ]
    header = ["aims", "corpus", "what", "aim", "measured", "outcome"]
    return "### Aims\n\n" + _table(header, rows)


def _faults_part(run: Run) -> str:
    lines = [
        f"- {each.program} failed in `{each.corpus}`, {LABELS[Work(each.work)]} "
        f"(repetition {each.repetition}): {each.message}"
        for each in run.failures
    ]
    disturbed = [each for each in run.samples if _disturbed(each, run.machine.cores)]
    if disturbed:
        lines.append(
            f"- In {len(disturbed)} of {len(run.samples)} measurements other processes and the "
            f"kernel's own threads took over {BUSY_SHARE:.0%} of the machine's processor time."
        )
    lines.append(
        f"- Peak memory is that of the largest process, or of a mount's server; below "
        f"{run.machine.floor_bytes / 1e6:.0f} MB it cannot be distinguished from the benchmark's own."
    )
    return "### Notes\n\n" + "\n".join(lines)


def _disturbed(sample: Sample, cores: int) -> bool:
    return sample.foreign_cpu_s > BUSY_SHARE * cores * sample.wall_s and sample.wall_s > 0.5


def _time_cell(run: Run, corpus: str, work: Work, program: str) -> str:
    wall = run.wall(corpus, work, program)
    if wall is None:
        return ""
    text = _spread_text(wall)
    if wall.count < run.repeat:
        text += f" [{wall.count} of {run.repeat}]"
    sizes = [each.work_bytes for each in run.select(corpus, work, program) if each.work_bytes]
    if work in (Work.READ, Work.READ_AGAIN) and sizes:
        text += f" = {_bytes_text(sizes[-1] / wall.median)}/s"
    if program == LIMIT:
        text += f" `{limit_label(work, corpus in SINGLE)}`".replace("|", "\\|")
    own = run.wall(corpus, work, CASFS)
    if own is not None and program != CASFS:
        text += f" **{own.median / wall.median:.2f}**"
    return text


def _cost_cell(run: Run, corpus: str, work: Work, program: str) -> str:
    samples = run.select(corpus, work, program)
    cpu = spread(each.cpu_s for each in samples)
    if cpu is None:
        return ""
    peak = max(each.peak_bytes for each in samples)
    text = f"{_seconds_text(cpu.median)}, {peak / 1e6:.0f} MB"
    own = spread(each.cpu_s for each in run.select(corpus, work, CASFS))
    if own is not None and program != CASFS and cpu.median > 0:
        text += f" **{own.median / cpu.median:.2f}**"
    return text


def _verdicts(run: Run, aims: Iterable[Aim]) -> str:
    return "; ".join(f"{aim.bound_text}: {aim.outcome(run).value}" for aim in aims)


def _programs_on(run: Run, corpus: str) -> list[str]:
    present = {each.program for each in run.samples if each.corpus == corpus}
    return [each.name for each in run.programs if each.name in present]


def _label(run: Run, program: str) -> str:
    return next(each.label for each in run.programs if each.name == program)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread_text(value: Spread) -> str:
    text = _seconds_text(value.median)
    if value.count > 1:
        text += f" ({_seconds_text(value.least)[:-2]}–{_seconds_text(value.greatest)[:-2]})"
    return text


def _seconds_text(seconds: float) -> str:
    digits = 1 if seconds >= 10 else 2 if seconds >= 1 else 3
    return f"{seconds:.{digits}f} s"


def _bytes_text(size: float, sign: str = "") -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= scale:
            return f"{size / scale:{sign}.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{size:{sign}.0f} B"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
