"""Draw the cost per file or blob over their number, as SVG; both scales are logarithmic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

COLOURS = ("#3b6ea5", "#c8762c", "#4f8f4f", "#8a5aa5", "#808080")
LEFT, WIDTH, RIGHT = 70, 520, 190
TOP, HEIGHT, BOTTOM = 46, 300, 40

Lines = Mapping[str, Sequence[tuple[int, float]]]
"""For each action, the counts and the microseconds per item."""


def render_growth(lines: Lines) -> str:
    """Return the SVG text, empty if there is nothing to draw."""
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    across = _decades([count for count, _ in points])
    upward = _decades([each_us for _, each_us in points])
    total_width, total_height = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total_width}" height="{total_height}" '
        f'viewBox="0 0 {total_width} {total_height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{total_width}" height="{total_height}" fill="#ffffff"/>',
        '<text x="12" y="20" font-size="15">µs for one file (processor time) or one look-up, '
        "by how many there are</text>",
    ]
    for power in range(across[0], across[1] + 1):
        x = LEFT + WIDTH * (power - across[0]) / (across[1] - across[0])
        parts.append(
            f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{TOP + HEIGHT}" stroke="#dddddd"/>'
            f'<text x="{x:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{10**power:,}</text>'
        )
    for power in range(upward[0], upward[1] + 1):
        y = TOP + HEIGHT * (upward[1] - power) / (upward[1] - upward[0])
        parts.append(
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + WIDTH}" y2="{y:.1f}" stroke="#dddddd"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>'
        )
    for number, (what, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [(_place(c, across) * WIDTH + LEFT, u) for c, u in line]
        drawn = " ".join(f"{x:.1f},{TOP + HEIGHT * (1 - _place(u, upward)):.1f}" for x, u in places)
        y = TOP + 14 + 20 * number
        parts.append(
            f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<rect x="{LEFT + WIDTH + 14}" y="{y - 9}" width="10" height="10" fill="{colour}"/>'
            f'<text x="{LEFT + WIDTH + 28}" y="{y}">{escape(what)}</text>'
        )
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Return the powers of ten around the values."""
    least = math.floor(math.log10(min(values)))
    return least, max(math.ceil(math.log10(max(values))), least + 1)


def _place(value: float, decades: tuple[int, int]) -> float:
    return (math.log10(value) - decades[0]) / (decades[1] - decades[0])
