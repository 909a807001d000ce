"""The line of progress, and the numbers in it."""

from __future__ import annotations

import dataclasses

import pytest

from casfs.cli.progress import (
    ProgressMeter,
    ProgressState,
    cells_of,
    format_duration,
    progress_line,
    shorten,
)
from casfs.monitor import Progress, Unit

MIB = 1 << 20

STATE = ProgressState(
    stage="reading packs",
    unit="packs",
    items=3,
    total_items=12,
    done_bytes=192 * MIB,
    total_bytes=768 * MIB,
    is_estimate=False,
    elapsed_s=64.2,
    rate=8.0 * MIB,
    path=b"home/anna/photos/2019/summer/beach.jpg",
)


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class TestLine:
    def test_a_line_shows_bytes_rate_remaining_time_and_the_file(self) -> None:
        assert progress_line("check", STATE, 160) == (
            "check: reading packs  25 %  192.0 MiB of 768.0 MiB  8.0 MiB/s  1:12 left  1:04  "
            "3 of 12 packs  home/anna/photos/2019/summer/beach.jpg"
        )

    def test_totals_of_the_previous_snapshot_are_marked_as_estimates(self) -> None:
        state = dataclasses.replace(STATE, stage="", unit="files", is_estimate=True, path=b"")
        assert progress_line("backup", state, 160) == (
            "backup: ~25 %  192.0 MiB of ~768.0 MiB  8.0 MiB/s  ~1:12 left  1:04  3 of ~12 files"
        )

    def test_a_backup_that_outgrows_its_estimate_shows_no_percentage(self) -> None:
        state = dataclasses.replace(STATE, done_bytes=800 * MIB, is_estimate=True)
        line = progress_line("backup", state, 160)
        assert "%" not in line
        assert "left" not in line

    @pytest.mark.parametrize("width", range(1, 200))
    @pytest.mark.parametrize("path", [b"a/b", b"x/" * 200, "写真/".encode() * 40, b"\xff\n" * 30])
    def test_a_line_is_never_wider_than_the_terminal(self, width: int, path: bytes) -> None:
        line = progress_line("check", dataclasses.replace(STATE, path=path), width)
        assert cells_of(line) <= width
        assert line.isprintable()

    def test_a_long_path_fills_the_terminal(self) -> None:
        for width in (100, 120, 200):
            line = progress_line("check", dataclasses.replace(STATE, path=b"x/" * 200), width)
            assert len(line) == (width if width >= 120 else len(line))
            assert width < 120 or line.endswith("x/x/")

    def test_a_narrow_terminal_shows_the_percentage_first(self) -> None:
        assert progress_line("check", STATE, 30) == "check: reading packs  25 %"

    def test_a_witness_read_is_shown_beside_the_file(self) -> None:
        state = dataclasses.replace(STATE, path=b"log", again_bytes=MIB)
        assert progress_line("backup", state, 160).endswith("log (read again: 1.0 MiB)")


class TestMeter:
    def test_the_rate_and_the_remaining_time_follow_from_the_last_seconds(self) -> None:
        clock, progress = Clock(), Progress()
        meter = ProgressMeter(progress, clock)
        progress.begin("", Unit.FILES, total_bytes=1000 * MIB)
        state = meter.measure()
        assert state.rate is None
        for _ in range(30):
            clock.now_s += 1
            progress.read_bytes(10 * MIB)
            state = meter.measure()
        assert state.rate == 10 * MIB
        assert state.remaining_s == 70
        assert state.share == 0.3
        for _ in range(15):
            clock.now_s += 1
            state = meter.measure()
        assert state.rate == 0
        assert state.remaining_s is None

    def test_bytes_of_a_file_that_is_read_again_count_for_the_rate_and_not_for_the_share(
        self,
    ) -> None:
        clock, progress = Clock(), Progress()
        meter = ProgressMeter(progress, clock)
        progress.begin("", Unit.FILES, total_bytes=40 * MIB)
        progress.read_bytes(20 * MIB)
        meter.measure()
        clock.now_s += 2
        progress.read_bytes_again(20 * MIB)
        state = meter.measure()
        assert (state.rate, state.share) == (10 * MIB, 0.5)

    def test_a_new_stage_measures_its_own_rate(self) -> None:
        clock, progress = Clock(), Progress()
        meter = ProgressMeter(progress, clock)
        progress.add_bytes(500 * MIB)
        meter.measure()
        clock.now_s += 5
        progress.begin("repacking", Unit.PACKS, total_bytes=10 * MIB)
        state = meter.measure()
        assert (state.rate, state.done_bytes, state.elapsed_s) == (None, 0, 5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (61.9, "1:01"), (3599, "59:59"), (3600 * 25 + 62, "25:01:02")],
)
def test_a_duration_is_shown_as_a_clock_shows_it(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_shortened_path_keeps_its_end() -> None:
    assert shorten("a/b/c", 5) == "a/b/c"
    assert shorten("some/long/path", 8) == "…ng/path"
    assert shorten("写真写真", 5) == "…写真"
