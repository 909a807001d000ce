"""Tables that are wider than the terminal."""

from __future__ import annotations

from casfs.cli.table import table_lines

HEADS = ("id", "paths", "files", "size", "note")
ROWS = [("3f2a", "/home/anna/letters", "12", "1.0 KiB", ""), ("91bc", "/srv", "3", "20 B", "")]


def lines(width: int, spare: tuple[str, ...] = ()) -> list[str]:
    numbers, texts = ("files", "size"), {"paths": 8}
    return list(table_lines(HEADS, numbers, ROWS, texts, width, spare))


def test_a_table_that_fits_keeps_all_columns() -> None:
    assert lines(80, ("files",))[0].split() == list(HEADS)


def test_a_narrow_table_loses_its_empty_columns_and_wraps_paths() -> None:
    head, first, more, last = lines(36, ("files",))
    assert head.split() == ["id", "paths", "files", "size"]
    assert first.split()[1] + more.strip() == "/home/anna/letters"
    assert max(map(len, (head, first, more, last))) <= 36


def test_a_spare_column_goes_only_where_narrow_paths_are_not_enough() -> None:
    assert "files" in lines(30, ("files",))[0]
    head, *_ = lines(27, ("files", "size"))
    assert head.split() == ["id", "paths", "size"]
    head, *_ = lines(20, ("files", "size"))
    assert head.split() == ["id", "paths"]
