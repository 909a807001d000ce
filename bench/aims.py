"""The performance aims of casfs, and whether a run meets them.

Four groups: *first light* for the first usable version, *mount* for reads through a mount, *hardware* for
the limits of the machine, *encryption* for the cost of encryption. A report shows all aims, met or missed.
Ratios compare medians of one run on one machine, so that the speed of the machine cancels out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from bench.corpus import CHURN, CORPORA
from bench.peers.limits import LIMIT
from bench.peers.memory_tree import FUSE_FAST
from bench.records import Run
from bench.works import MOUNTED, NO_CORPUS, TREE_READINGS, Work

CASFS = "casfs"
ENCRYPTED = "casfs-encrypted"
BORG = "borg"
BORG_ZSTD = "borg-zstd"
RESTIC = "restic"
PLAIN_WORKS = (Work.FIRST, Work.LIST, Work.UNCHANGED, Work.REREAD, Work.RESTORE, Work.CHECK)
TRIVIAL = "trivial FUSE with the same event library"
EARLY_DAYS = LATE_DAYS = 5

Measure = Callable[[Run], float | None]


class Outcome(Enum):
    """Whether a run meets an aim."""

    MET = "met"
    MISSED = "missed"
    UNKNOWN = "not measured"


@dataclass(frozen=True, slots=True)
class Aim:
    """A bound on one measured value.

    `text` says what is compared with what; `unit` follows both numbers. The value must be at most the
    bound, or at least the bound with `at_least`. `shown_with` names the row of the report.
    """

    group: str
    corpus: str
    work: Work
    text: str
    bound: float
    unit: str
    measure: Measure
    at_least: bool = False

    def value(self, run: Run) -> float | None:
        """Return the measured value, None if a measurement for it is missing."""
        return self.measure(run)

    def outcome(self, run: Run) -> Outcome:
        """Return whether a run meets the aim."""
        value = self.measure(run)
        if value is None:
            return Outcome.UNKNOWN
        good = value >= self.bound if self.at_least else value <= self.bound
        return Outcome.MET if good else Outcome.MISSED

    @property
    def bound_text(self) -> str:
        """Return the bound in words, such as `≤ 0.4 × borg`."""
        sign = "≥" if self.at_least else "≤"
        return f"{sign} {_number(self.bound)} {self.unit}"

    def value_text(self, run: Run) -> str:
        """Return the measured value with two or three digits, or a dash."""
        value = self.measure(run)
        return "–" if value is None else _number(value)


def time_ratio(corpus: str, work: Work, *references: str, program: str = CASFS) -> Measure:
    """Return the ratio of casfs's wall time (or `program`'s) to that of the fastest reference.

    It is None unless casfs and all references were measured: without the fastest reference the aim
    would be easier.
    """

    def measure(run: Run) -> float | None:
        own = run.wall(corpus, work, program)
        others = [run.wall(corpus, work, name) for name in references]
        medians = [each.median for each in others if each is not None]
        if own is None or len(medians) < len(references):
            return None
        return own.median / min(medians)

    return measure


def rate_ratio(corpus: str, work: Work, reference: str, program: str = CASFS) -> Measure:
    """Measure casfs's bytes a second (or another program's) over a reference's, for the same bytes."""

    def measure(run: Run) -> float | None:
        ratio = time_ratio(corpus, work, reference, program=program)(run)
        return None if ratio is None else 1 / ratio

    return measure


def rate_megabytes(corpus: str, work: Work) -> Measure:
    """Measure the bytes of the corpus that casfs reads in a second, in MiB/s."""

    def measure(run: Run) -> float | None:
        own = run.wall(corpus, work, CASFS)
        sizes = [each.work_bytes for each in run.select(corpus, work, CASFS) if each.work_bytes]
        return sizes[-1] / own.median / (1 << 20) if own is not None and sizes else None

    return measure


def work_ratio(corpus: str, work: Work, reference: Work) -> Measure:
    """Measure casfs's time for a work over its time for another work on the same corpus."""

    def measure(run: Run) -> float | None:
        own = run.wall(corpus, work, CASFS)
        other = run.wall(corpus, reference, CASFS)
        return None if own is None or other is None else own.median / other.median

    return measure


def peak_megabytes(corpus: str, *works: Work) -> Measure:
    """Measure the greatest memory that casfs took in any repetition of the works, in MB."""

    def measure(run: Run) -> float | None:
        peaks = [each.peak_bytes for work in works for each in run.select(corpus, work, CASFS)]
        return max(peaks) / 1e6 if peaks else None

    return measure


def stored_ratio(corpus: str) -> Measure:
    """Measure what casfs stores over the least that a peer with zstd stores."""

    def measure(run: Run) -> float | None:
        own = _stored(run, corpus, CASFS)
        peers = [_stored(run, corpus, name) for name in (BORG_ZSTD, RESTIC)]
        known = [each for each in peers if each is not None]
        return own / min(known) if own is not None and len(known) == len(peers) else None

    return measure


def startup_extra_ms(corpus: str, work: Work) -> Measure:
    """Measure how much longer a short command takes than the interpreter's start alone, in ms."""

    def measure(run: Run) -> float | None:
        own = run.wall(corpus, work, CASFS)
        python = run.wall(NO_CORPUS, Work.STARTUP, LIMIT)
        return None if own is None or python is None else (own.median - python.median) * 1000

    return measure


def day_slowdown(run: Run) -> float | None:
    """Measure the mean time of the last days over that of the first ones."""
    days = [each.day_wall_s for each in run.select("daily", Work.DAILY, CASFS)]
    early = _mean(wall for each in days for wall in each[:EARLY_DAYS])
    late = _mean(wall for each in days for wall in each[-LATE_DAYS:])
    return None if early is None or late is None else late / early


def day_growth(run: Run) -> float | None:
    """Measure a day's mean growth over the same share of the first backup's stored bytes."""
    first = _stored(run, "daily", CASFS)
    samples = run.select("daily", Work.DAILY, CASFS)
    grown = _mean(grown for each in samples for grown in each.day_grown_bytes)
    return None if not first or grown is None else grown / (first * CHURN)


def _stored(run: Run, corpus: str, program: str) -> float | None:
    samples = run.select(corpus, Work.FIRST, program)
    return _mean(each.stored_bytes for each in samples if each.stored_bytes is not None)


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None


def _faster(
    group: str, corpus: str, work: Work, bound: float, *references: str, text: str = ""
) -> Aim:
    unit = f"× {text or ' and '.join(references)}"
    return Aim(group, corpus, work, "time", bound, unit, time_ratio(corpus, work, *references))


def _quicker(group: str, corpus: str, work: Work, bound: float, reference: str) -> Aim:
    measure = rate_ratio(corpus, work, reference)
    return Aim(group, corpus, work, "rate", bound, f"× {reference}", measure, at_least=True)


def _smaller(group: str, corpus: str, bound: float, *works: Work) -> Aim:
    measure = peak_megabytes(corpus, *works)
    return Aim(group, corpus, works[0], "peak memory", bound, "MB", measure)


FIRST_LIGHT = (
    _faster("first light", "real", Work.FIRST, 0.7, BORG),
    _faster("first light", "real", Work.UNCHANGED, 0.6, RESTIC),
    _smaller("first light", "real", 200, Work.FIRST, Work.UNCHANGED),
    _faster("first light", "real", Work.FIND, 0.4, BORG),
    _quicker("first light", "big", Work.READ, 3, BORG),
)
MOUNT = (
    _faster("mount", "real", Work.FIND, 0.25, BORG),
    _faster("mount", "real", Work.FIND, 0.35, RESTIC),
    _smaller("mount", "real", 100, *(work for work in Work if work in MOUNTED)),
    _faster("mount", "real", Work.COPY, 0.35, BORG),
    _faster("mount", "real", Work.COPY, 2, LIMIT, text="cp -a of the source"),
    _faster("mount", "real", Work.GREP, 0.5, BORG, RESTIC, text="the better peer"),
    _quicker("mount", "big", Work.READ, 5, BORG),
    _quicker("mount", "big", Work.READ, 7, RESTIC),
    Aim(
        "mount",
        "big",
        Work.READ,
        "rate",
        900,
        "MiB/s",
        rate_megabytes("big", Work.READ),
        at_least=True,
    ),
    _quicker("mount", "big", Work.RANDOM, 3, BORG),
    _faster("mount", "big", Work.READ_AGAIN, 1.25, FUSE_FAST, text="trivial FUSE, from the cache"),
    *(_faster("mount", "real", work, 1.3, FUSE_FAST, text=TRIVIAL) for work in TREE_READINGS),
    _faster("mount", "big", Work.READ, 1.3, FUSE_FAST, text=TRIVIAL),
    Aim(
        "mount",
        "real",
        Work.READERS,
        "time",
        1,
        "× one reader",
        work_ratio("real", Work.READERS, Work.CAT),
    ),
)
HARDWARE = (
    _faster("hardware", "real", Work.FIRST, 0.4, BORG),
    _faster("hardware", "real", Work.FIRST, 0.3, RESTIC),
    _faster("hardware", "real", Work.FIRST, 1.3, LIMIT, text="tar and zstd"),
    _faster("hardware", "real", Work.UNCHANGED, 0.2, BORG),
    _faster("hardware", "real", Work.UNCHANGED, 0.3, RESTIC),
    _faster("hardware", "real", Work.UNCHANGED, 3, LIMIT, text="find -printf"),
    _faster("hardware", "big", Work.FIRST, 0.45, BORG_ZSTD),
    _faster("hardware", "big", Work.FIRST, 1.15, LIMIT, text="zstd -3 -T2"),
    _faster("hardware", "big", Work.REREAD, 0.3, BORG),
    _faster("hardware", "big", Work.REREAD, 3, LIMIT, text="hashing it"),
    _faster("hardware", "real", Work.RESTORE, 0.55, BORG),
    _faster("hardware", "real", Work.RESTORE, 1.3, LIMIT, text="cp -a"),
    _faster("hardware", "big", Work.RESTORE, 0.55, BORG),
    _faster("hardware", "big", Work.RESTORE, 1.3, LIMIT, text="cp -a"),
    _faster("hardware", "real", Work.CHECK, 0.4, BORG),
    _faster("hardware", "big", Work.CHECK, 0.5, BORG),
    *(
        Aim(
            "hardware",
            corpus.name,
            Work.FIRST,
            "stored size",
            1,
            "× the best peer with zstd",
            stored_ratio(corpus.name),
        )
        for corpus in CORPORA
    ),
    _smaller("hardware", "real", 150, *PLAIN_WORKS),
    _smaller("hardware", "big", 150, *PLAIN_WORKS),
    _smaller("hardware", "million", 250, *PLAIN_WORKS),
    *(
        Aim(
            "hardware",
            corpus,
            work,
            "time",
            extra_ms,
            "ms more than `python -c pass`",
            startup_extra_ms(corpus, work),
        )
        for corpus, work, extra_ms in ((NO_CORPUS, Work.STARTUP, 90), ("real", Work.LIST, 200))
    ),
    Aim(
        "hardware", "daily", Work.DAILY, "time", 1.3, "× the first days, in the last", day_slowdown
    ),
    Aim("hardware", "daily", Work.DAILY, "growth", 2, "× the share that changed", day_growth),
)
ENCRYPTION = (
    *(
        Aim(
            "encryption",
            corpus,
            Work.FIRST,
            "time, encrypted",
            1.15,
            "× unencrypted",
            time_ratio(corpus, Work.FIRST, CASFS, program=ENCRYPTED),
        )
        for corpus in ("real", "big")
    ),
    Aim(
        "encryption",
        "big",
        Work.READ,
        "rate, encrypted",
        0.9,
        "× unencrypted",
        rate_ratio("big", Work.READ, CASFS, ENCRYPTED),
        at_least=True,
    ),
)
AIMS = FIRST_LIGHT + MOUNT + HARDWARE + ENCRYPTION


def aims_for(corpus: str, work: Work, text: str) -> tuple[Aim, ...]:
    """Return the aims that bound one value of one row, the mildest first."""
    return tuple(aim for aim in AIMS if (aim.corpus, aim.work, aim.text) == (corpus, work, text))


def _number(value: float) -> str:
    """Return a number with as many digits as a reader can use."""
    if value >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
