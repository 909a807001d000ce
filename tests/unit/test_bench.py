"""The benchmark's own arithmetic and sentences: aims, report, chart and the form of the results."""

from __future__ import annotations

import os
import signal
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from bench.aims import AIMS, Aim, Outcome, day_growth, day_slowdown, time_ratio
from bench.chart import GREATEST, LEAST, position, ratio_groups, render_chart
from bench.content import TextStream
from bench.corpus import CORPORA, DAYS, QUICK, Scale, stored_bytes, survey
from bench.growth import made_digest
from bench.growthchart import render_growth
from bench.measure import Child, Command, CommandError, run
from bench.records import (
    CorpusFacts,
    Failure,
    MachineFacts,
    Missing,
    ProgramFacts,
    Run,
    Sample,
    decode_run,
    encode_run,
    spread,
)
from bench.report import render_report
from bench.scratch import Scratch, ScratchError
from bench.works import Work, works_on

MACHINE = MachineFacts(2, "A processor", 8 << 30, "Linux 6", "Debian", "3.11.2", "ext4", 20 << 20)
PROGRAMS = (
    ProgramFacts("casfs", "casfs", "casfs 1.2.3"),
    ProgramFacts("borg", "borg (lz4)", "borg 1.4.1"),
    ProgramFacts("borg-zstd", "borg (zstd,3)", "borg 1.4.1"),
    ProgramFacts("restic", "restic", "restic 0.14"),
    ProgramFacts("limit", "the machine", ""),
)
REAL = CorpusFacts("real", "a copy of folders", 55_000, 60_000, 900_000_000)


def a_sample(work: Work, program: str, wall_s: float, repetition: int = 1) -> Sample:
    return Sample("real", work.value, program, repetition, wall_s, wall_s * 1.5, 90_000_000, 0.0)


def a_run(*samples: Sample) -> Run:
    return Run(
        started="2026-01-02 03:04 +0000",
        repeat=max((sample.repetition for sample in samples), default=1),
        quick=False,
        finished=True,
        machine=MACHINE,
        programs=PROGRAMS,
        missing=(),
        corpora=(REAL,),
        samples=samples,
        failures=(),
        notes=(),
    )


def the_aim(group: str, work: Work, reference: str) -> Aim:
    [aim] = [
        aim
        for aim in AIMS
        if (aim.group, aim.corpus, aim.work) == (group, "real", work)
        and aim.unit == f"× {reference}"
    ]
    return aim


@pytest.mark.parametrize(
    ("seconds", "outcome"), [(6.9, Outcome.MET), (7.0, Outcome.MET), (7.1, Outcome.MISSED)]
)
def test_a_time_aim_is_met_up_to_its_bound(seconds: float, outcome: Outcome) -> None:
    found = a_run(a_sample(Work.FIRST, "casfs", seconds), a_sample(Work.FIRST, "borg", 10.0))
    assert the_aim("first light", Work.FIRST, "borg").outcome(found) is outcome


def test_a_rate_aim_wants_the_reference_to_take_at_least_so_many_times_longer() -> None:
    [aim] = [aim for aim in AIMS if aim.group == "first light" and aim.work is Work.READ]
    for casfs_s, outcome in ((1.0, Outcome.MET), (1.1, Outcome.MISSED)):
        samples = (
            replace(a_sample(Work.READ, "casfs", casfs_s), corpus="big"),
            replace(a_sample(Work.READ, "borg", 3.0), corpus="big"),
        )
        assert aim.outcome(a_run(*samples)) is outcome


def test_an_aim_is_judged_by_medians_and_not_by_the_luckiest_repetition() -> None:
    times = (1.0, 9.0, 9.0)
    own = [a_sample(Work.FIRST, "casfs", wall, n) for n, wall in enumerate(times, 1)]
    found = a_run(*own, a_sample(Work.FIRST, "borg", 10.0))
    assert the_aim("first light", Work.FIRST, "borg").value(found) == pytest.approx(0.9)


@pytest.mark.parametrize("absent", ["casfs", "borg"])
def test_an_aim_without_a_measurement_on_either_side_is_not_judged(absent: str) -> None:
    present = "borg" if absent == "casfs" else "casfs"
    found = a_run(a_sample(Work.FIRST, present, 10.0))
    aim = the_aim("first light", Work.FIRST, "borg")
    assert aim.outcome(found) is Outcome.UNKNOWN
    assert aim.value_text(found) == "–"


def test_the_better_peer_is_unknown_while_one_of_the_peers_is_missing() -> None:
    measure = time_ratio("real", Work.GREP, "borg", "restic")
    own, borg = a_sample(Work.GREP, "casfs", 1.0), a_sample(Work.GREP, "borg", 4.0)
    assert measure(a_run(own, borg)) is None
    assert measure(a_run(own, borg, a_sample(Work.GREP, "restic", 2.0))) == 0.5


def test_peak_memory_is_that_of_the_worst_repetition_of_any_bounded_work() -> None:
    [aim] = [a for a in AIMS if (a.group, a.text) == ("first light", "peak memory")]
    small = a_sample(Work.FIRST, "casfs", 1.0)
    large = replace(a_sample(Work.UNCHANGED, "casfs", 1.0, 2), peak_bytes=201_000_000)
    assert aim.outcome(a_run(small)) is Outcome.MET
    assert aim.outcome(a_run(small, large)) is Outcome.MISSED


def test_stored_size_is_compared_with_the_least_that_a_peer_with_zstd_stores() -> None:
    [aim] = [a for a in AIMS if (a.corpus, a.text) == ("real", "stored size")]
    sizes = {"casfs": 95, "borg": 50, "borg-zstd": 100, "restic": 120}
    samples = [
        replace(a_sample(Work.FIRST, program, 1.0), stored_bytes=size)
        for program, size in sizes.items()
    ]
    assert aim.value(a_run(*samples)) == pytest.approx(0.95)


def test_daily_backups_are_judged_by_their_last_days_and_by_what_they_add() -> None:
    daily = replace(
        a_sample(Work.DAILY, "casfs", 30.0),
        corpus="daily",
        day_wall_s=(1.0,) * 15 + (2.0,) * 5,
        day_grown_bytes=(30,) * DAYS,
    )
    first = replace(a_sample(Work.FIRST, "casfs", 9.0), corpus="daily", stored_bytes=1000)
    assert day_slowdown(a_run(first, daily)) == pytest.approx(2.0)
    assert day_growth(a_run(first, daily)) == pytest.approx(3.0)


def test_every_aim_names_a_work_that_is_done_on_its_corpus() -> None:
    done = {(corpus.name, work) for corpus in CORPORA for work in works_on(corpus)}
    done.add(("none", Work.STARTUP))
    assert [aim for aim in AIMS if (aim.corpus, aim.work) not in done] == []


def test_the_report_shows_median_spread_ratio_and_verdict_of_a_work() -> None:
    own = [a_sample(Work.FIRST, "casfs", wall, n) for n, wall in enumerate((4.0, 5.0, 7.0), 1)]
    report = render_report(a_run(*own, a_sample(Work.FIRST, "borg", 10.0)))
    row = report.splitlines()[report.splitlines().index("| --- | --- | --- | --- |") + 1]
    assert "5.00 s (4.00–7.00)" in row
    assert "10.0 s [1 of 3] **0.50**" in row
    assert "≤ 0.70 × borg: met" in row
    assert "≤ 0.40 × borg: missed" in row


def test_the_report_names_what_is_missing_and_shows_no_column_for_it() -> None:
    found = replace(
        a_run(a_sample(Work.FIRST, "casfs", 5.0)),
        missing=(Missing("borg", "it is not installed"),),
    )
    report = render_report(found)
    assert "**Missing: borg**, it is not installed." in report
    assert "borg (lz4)" not in report
    assert "≤ 0.70 × borg: not measured" in report


def test_the_report_keeps_the_pipe_of_a_limit_out_of_the_table_syntax() -> None:
    found = a_run(a_sample(Work.FIRST, "casfs", 5.0), a_sample(Work.FIRST, "limit", 4.0))
    lines = render_report(found).splitlines()
    [row] = [line for line in lines if "zstd -3 -T0" in line]
    assert "`tar \\| zstd -3 -T0`" in row


def test_the_report_says_when_a_run_was_cut_short_or_something_failed() -> None:
    failure = Failure("real", Work.FIND.value, "restic", 2, "it hung")
    found = replace(a_run(a_sample(Work.FIRST, "casfs", 5.0)), finished=False, failures=(failure,))
    report = render_report(found)
    assert "The run was not finished" in report
    assert "restic failed in `real`, `find` on a fresh mount (cold) (repetition 2): it hung" in (
        report
    )


def test_a_cell_with_fewer_repetitions_than_were_asked_for_says_so() -> None:
    own = [a_sample(Work.FIRST, "casfs", 5.0, n) for n in (1, 2, 3)]
    report = render_report(a_run(*own, a_sample(Work.FIRST, "borg", 10.0)))
    assert "10.0 s [1 of 3]" in report
    assert "5.00 s (5.00–5.00) |" in report


def test_the_report_says_how_many_measurements_were_disturbed() -> None:
    calm = a_sample(Work.FIRST, "casfs", 10.0)
    disturbed = replace(a_sample(Work.FIRST, "borg", 10.0), foreign_cpu_s=9.0)
    report = render_report(a_run(calm, disturbed))
    assert "In 1 of 2 measurements other processes" in report


def test_the_report_gives_a_rate_for_sequential_reads() -> None:
    big = CorpusFacts("big", "one file", 1, 1, 2_000_000_000)
    sample = replace(a_sample(Work.READ, "casfs", 2.0), corpus="big", work_bytes=big.file_bytes)
    report = render_report(replace(a_run(sample), corpora=(big,)))
    assert "2.00 s = 1.00 GB/s" in report


def test_results_survive_being_written_and_read() -> None:
    daily = replace(
        a_sample(Work.DAILY, "casfs", 30.0),
        stored_bytes=5,
        day_wall_s=(1.5, 2.5),
        day_grown_bytes=(1, 2),
    )
    found = replace(
        a_run(daily, a_sample(Work.FIRST, "borg", 1 / 3)),
        missing=(Missing("restic", "it is “missing”"),),
        failures=(Failure("real", "find", "borg", 1, "a\nmessage"),),
        notes=("A note.",),
    )
    assert decode_run(encode_run(found)) == found


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": 2}', '{"format": 1}'])
def test_results_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="benchmark results"):
        decode_run(text)


def test_the_spread_of_an_even_number_of_values_has_the_middle_between_them() -> None:
    value = spread([4.0, 1.0, 2.0, 8.0])
    assert value is not None
    assert (value.median, value.least, value.greatest, value.count) == (3.0, 1.0, 8.0, 4)
    assert spread([]) is None


def test_the_chart_is_well_formed_and_has_a_bar_for_every_ratio() -> None:
    found = a_run(
        a_sample(Work.FIRST, "casfs", 5.0),
        a_sample(Work.FIRST, "borg", 10.0),
        a_sample(Work.FIRST, "limit", 2.5),
        a_sample(Work.FIND, "borg", 10.0),
    )
    [group] = ratio_groups(found)
    assert [(bar.program, bar.ratio) for bar in group.bars] == [("borg", 0.5), ("limit", 2.0)]
    root = ElementTree.fromstring(render_chart(found))
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "0.50" in texts
    assert "2.00" in texts


def test_there_is_no_chart_without_a_measurement_of_casfs() -> None:
    assert render_chart(a_run(a_sample(Work.FIRST, "borg", 10.0))) == ""


def test_the_chart_keeps_extreme_ratios_inside_its_scale() -> None:
    assert position(LEAST / 10) == position(LEAST)
    assert position(GREATEST * 10) == position(GREATEST)
    assert position(0.5) < position(1.0) < position(2.0)


def test_the_same_seed_gives_the_same_text_however_it_is_taken() -> None:
    whole = TextStream("seed").take(3_000_000)
    stream = TextStream("seed")
    assert stream.take(1) + stream.take(1_999_999) + stream.take(1_000_000) == whole
    assert TextStream("other").take(1000) != whole[:1000]


TINY = Scale(
    real_files=1,
    small_files=150,
    million_files=120,
    daily_files=110,
    big_bytes=3_000_000,
    incompressible_bytes=2_000_001,
    image_bytes=1 << 20,
)


@pytest.mark.parametrize("name", [corpus.name for corpus in CORPORA if corpus.name != "real"])
def test_a_synthetic_corpus_is_the_same_whenever_it_is_made(name: str, tmp_path: Path) -> None:
    [corpus] = [each for each in CORPORA if each.name == name]
    contents = []
    for place in ("one", "two"):
        folder = tmp_path / place
        folder.mkdir()
        assert corpus.build(folder, TINY)
        if corpus.change is not None:
            corpus.change(folder, 1)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        contents.append([(str(path.relative_to(folder)), path.read_bytes()) for path in files])
    assert contents[0] == contents[1]
    assert len(contents[0]) == survey(name, "", tmp_path / "one").files


def test_a_changed_image_differs_in_exactly_the_chosen_blocks(tmp_path: Path) -> None:
    [corpus] = [each for each in CORPORA if each.name == "image"]
    corpus.build(tmp_path, TINY)
    image = tmp_path / "disk.img"
    before = image.read_bytes()
    assert corpus.change is not None
    corpus.change(tmp_path, 7)
    after = image.read_bytes()
    blocks = [before[at : at + 4096] != after[at : at + 4096] for at in range(0, len(after), 4096)]
    assert sum(blocks) == 50
    assert len(before) == len(after)


def test_the_quick_corpora_are_smaller_than_the_full_ones_in_every_way() -> None:
    assert all(corpus.estimate(QUICK)[0] < 200_000_000 for corpus in CORPORA)


def test_holes_do_not_count_as_stored(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as stream:
        stream.truncate(1 << 30)
    (tmp_path / "small").write_bytes(b"x" * 10)
    assert stored_bytes(tmp_path) == 10


def test_a_command_is_charged_for_what_its_children_did(tmp_path: Path) -> None:
    script = f"{sys.executable} -c 'x = bytearray(96 << 20); sum(range(4_000_000))'; true"
    usage = run(Command(("sh", "-c", script)), tmp_path / "log", 60.0)
    assert usage.peak_bytes > 96 << 20
    assert 0 < usage.cpu_s <= usage.wall_s * 2 + 0.1


def test_a_failing_command_is_reported_with_the_end_of_its_output(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"ended with code 3: the reason$"):
        run(Command(("sh", "-c", "echo the reason; exit 3")), tmp_path / "log", 60.0)


def test_a_command_that_hangs_is_ended_with_everything_it_started(tmp_path: Path) -> None:
    script = "sleep 1000 & echo $!; wait"
    with pytest.raises(CommandError, match=r"was not done in 1 s"):
        run(Command(("sh", "-c", script)), tmp_path / "log", 1.0)
    pid = int((tmp_path / "log").read_text())
    deadline = time.monotonic() + 20
    while _lives(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_child_is_ended_when_its_context_is_left_by_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        Child(Command(("sleep", "1000")), tmp_path / "log") as child,
    ):
        pid = child.pid
        raise KeyboardInterrupt
    assert not _lives(pid)


def _lives(pid: int) -> bool:
    """Return whether a process runs; one that only waits to be reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_scratch_files_are_removed_after_an_interrupt(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Scratch(tmp_path / "scratch") as scratch:
        (scratch.make("a", "b") / "file").write_bytes(b"x")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert signal.getsignal(signal.SIGTERM) == before
    assert list((tmp_path / "scratch").iterdir()) == []


def test_too_little_room_is_reported_before_anything_is_made(tmp_path: Path) -> None:
    with (
        Scratch(tmp_path) as scratch,
        pytest.raises(ScratchError, match=r"The corpus `big` needs about .* GB in .* are free"),
    ):
        scratch.need(1 << 60, 10, "The corpus `big`")


def test_the_chart_of_growth_is_well_formed_and_has_a_line_for_everything_done() -> None:
    lines = {"first & last": [(10_000, 80.0), (1_000_000, 85.5)], "look up": [(100_000, 0.7)]}
    drawn = ElementTree.fromstring(render_growth(lines)).findall("{*}polyline")
    points = [line.attrib["points"].split() for line in drawn]
    assert [len(each) for each in points] == [2, 1]
    heights = [float(place.split(",")[1]) for place in (*points[0], *points[1])]
    assert heights[1] < heights[0] < heights[2]
    assert render_growth({}) == ""


def test_digests_that_are_made_for_an_index_are_sorted_and_different() -> None:
    digests = [made_digest(0, number, 1000) for number in range(1000)]
    assert digests == sorted(set(digests))
    assert not set(digests) & {made_digest(1, number, 1000) for number in range(1000)}
