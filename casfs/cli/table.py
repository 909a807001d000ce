"""Lay out tables as lines of text; a table that is wider than the terminal wraps the text in its cells."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest

_GAP = "  "


def table_lines(
    heads: tuple[str, ...],
    numbers: Container[str],
    rows: Iterable[tuple[str, ...]],
    texts: Mapping[str, int],
    max_characters: int | None = None,
    spare: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the lines of a table; columns whose heads are in `numbers` are aligned to the right.

    `max_characters` is the width of the terminal, None for no limit. A table that is too wide loses its
    empty columns, then as many of the `spare` ones, in their order, as is needed. Then its widest columns
    of `texts` become narrower, each to its number of characters at least. Other columns keep their width,
    so a table of many columns may stay too wide.
    """
    lines = [heads, *rows]
    widths = _widths(lines)
    if max_characters is not None and _line_characters(widths) > max_characters:
        kept = [column for column in range(len(heads)) if any(line[column] for line in lines[1:])]
        for head in spare:
            least = [min(widths[n], texts.get(heads[n], widths[n])) for n in kept]
            if _line_characters(least) > max_characters:
                kept = [column for column in kept if heads[column] != head]
        lines = [tuple(line[column] for column in kept) for line in lines]
        widths = _widths(lines)
        _narrow(widths, [texts.get(head) for head in lines[0]], max_characters)
    for line in lines:
        wrapped = [_wrap(cell, width) for cell, width in zip(line, widths, strict=True)]
        for cells in zip_longest(*wrapped, fillvalue=""):
            aligned = [
                f"{cell:>{width}}" if head in numbers else f"{cell:<{width}}"
                for head, cell, width in zip(lines[0], cells, widths, strict=True)
            ]
            yield _GAP.join(aligned).rstrip()


def _widths(lines: Sequence[tuple[str, ...]]) -> list[int]:
    return [max(map(len, cells)) for cells in zip(*lines, strict=True)]


def _line_characters(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _narrow(widths: list[int], least: Sequence[int | None], max_characters: int) -> None:
    """Shorten the widest columns of text, one character at a time, until a line fits."""
    for _ in range(_line_characters(widths) - max_characters):
        wider = [
            column
            for column, width in enumerate(least)
            if width is not None and widths[column] > width
        ]
        if not wider:
            return
        widths[max(wider, key=lambda column: widths[column])] -= 1


def _wrap(cell: str, width: int) -> list[str]:
    """Cut a cell into pieces of a column's width, after a separator of paths and words where there is one."""
    pieces = []
    while len(cell) > width:
        end = max(cell.rfind(mark, 0, width) for mark in "/, ") + 1
        end = end or width
        pieces.append(cell[:end].rstrip(" "))
        cell = cell[end:]
    return [*pieces, cell]
