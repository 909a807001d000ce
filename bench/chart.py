"""Draw a run as SVG: for each work, the ratio of casfs's time to each other program's, on a log scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from xml.sax.saxutils import escape

from bench.aims import CASFS
from bench.peers.memory_tree import LOOPS
from bench.records import Run
from bench.works import LABELS, Work

LEAST, GREATEST = 0.02, 20.0
GRID = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
COLOURS = {"borg": "#3b6ea5", "borg-zstd": "#7fa8d0", "restic": "#c8762c", "limit": "#808080"}
LEFT, WIDTH, RIGHT = 360, 520, 70
TOP, BAR, GAP = 64, 13, 12


@dataclass(frozen=True, slots=True)
class Bar:
    """One ratio; below 1 casfs is faster."""

    program: str
    ratio: float


@dataclass(frozen=True, slots=True)
class Group:
    """The bars of one work on one corpus."""

    title: str
    bars: tuple[Bar, ...]


def ratio_groups(run: Run) -> tuple[Group, ...]:
    """Return the works that casfs and at least one other program did, which can be drawn."""
    groups = []
    for facts in run.corpora:
        for work in Work:
            own = run.wall(facts.name, work, CASFS)
            if own is None:
                continue
            bars = []
            for program in run.programs:
                other = run.wall(facts.name, work, program.name)
                if other is not None and program.name not in (CASFS, *LOOPS):
                    bars.append(Bar(program.name, own.median / other.median))
            if bars:
                title = f"{facts.name}: {LABELS[work].replace('`', '')}"
                groups.append(Group(title, tuple(bars)))
    return tuple(groups)


def render_chart(run: Run) -> str:
    """Return the SVG text, empty if there is no ratio to draw."""
    groups = ratio_groups(run)
    if not groups:
        return ""
    height = TOP + sum(len(each.bars) * BAR + GAP for each in groups) + 16
    total = LEFT + WIDTH + RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height}" '
        f'viewBox="0 0 {total} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{total}" height="{height}" fill="#ffffff"/>',
        '<text x="12" y="20" font-size="15">casfs’s time divided by another program’s '
        "(left of 1: casfs is faster)</text>",
        _legend(run, groups),
    ]
    parts += [_grid_line(value, height) for value in GRID]
    top = TOP
    for group in groups:
        middle = top + len(group.bars) * BAR / 2 + 4
        parts.append(
            f'<text x="{LEFT - 10}" y="{middle:.0f}" text-anchor="end">{escape(group.title)}</text>'
        )
        for bar in group.bars:
            parts.append(_bar(bar, top))
            top += BAR
        top += GAP
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def position(ratio: float) -> float:
    """Return the horizontal position of a ratio; a ratio beyond the scale is drawn at its end."""
    clamped = min(max(ratio, LEAST), GREATEST)
    return LEFT + WIDTH * math.log(clamped / LEAST) / math.log(GREATEST / LEAST)


def _bar(bar: Bar, top: float) -> str:
    start, end = sorted((position(1.0), position(bar.ratio)))
    beside = end + 4 if bar.ratio >= 1 else start - 4
    anchor = "start" if bar.ratio >= 1 else "end"
    return (
        f'<rect x="{start:.1f}" y="{top + 1:.1f}" width="{max(end - start, 1):.1f}" '
        f'height="{BAR - 2}" fill="{COLOURS.get(bar.program, "#444444")}"/>'
        f'<text x="{beside:.1f}" y="{top + BAR - 3:.1f}" font-size="10" text-anchor="{anchor}">'
        f"{bar.ratio:.2f}</text>"
    )


def _grid_line(value: float, height: int) -> str:
    place = position(value)
    stroke = "#000000" if value == 1.0 else "#dddddd"
    return (
        f'<line x1="{place:.1f}" y1="{TOP - 6}" x2="{place:.1f}" y2="{height - 12}" '
        f'stroke="{stroke}"/><text x="{place:.1f}" y="{TOP - 10}" font-size="10" '
        f'text-anchor="middle">{value:g}</text>'
    )


def _legend(run: Run, groups: tuple[Group, ...]) -> str:
    drawn = {bar.program for group in groups for bar in group.bars}
    parts = []
    place = 12
    for program in run.programs:
        if program.name in drawn:
            colour = COLOURS.get(program.name, "#444444")
            parts.append(
                f'<rect x="{place}" y="30" width="10" height="10" fill="{colour}"/>'
                f'<text x="{place + 14}" y="39">{escape(program.label)}</text>'
            )
            place += 34 + 7 * len(program.label)
    return "".join(parts)
