"""Each parser returns or raises its documented error, in bounded time and memory, and repeats itself."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.fuzz.engine import Folder, FoundError, run, shares
from tests.fuzz.found import FOUND
from tests.fuzz.mutation import blown_up, mutations
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS

INPUTS = 2000
LONG_BYTES = 64 << 10


@pytest.fixture(params=TARGETS.values(), ids=lambda target: target.name.replace(" ", "-"))
def target(request: pytest.FixtureRequest, own_home: Path) -> Target:
    found: Target = request.param
    return found


@pytest.fixture(autouse=True)
def without_warnings(caplog: pytest.LogCaptureFixture) -> None:
    """Format no log records: most inputs are damaged, and the parsers say so."""
    caplog.set_level("CRITICAL", "casfs")


def test_a_parser_accepts_a_real_object(target: Target) -> None:
    assert any(target.accepts(seed) for seed in target.seeds())


def test_no_changed_object_makes_a_parser_raise_an_undocumented_error(target: Target) -> None:
    dice = random.Random(target.name)
    for data in mutations(target.seeds(), INPUTS // target.cost, dice):
        try:
            target.accepts(data)
        except Exception as error:
            error.add_note(f"{target.name}: {data[:2000]!r}")
            raise


@pytest.mark.parametrize(("name", "data"), FOUND)
def test_an_input_that_once_broke_a_parser_has_its_documented_error(
    name: str, data: bytes, own_home: Path
) -> None:
    TARGETS[name].accepts(data)


def test_long_objects_take_linear_time_and_memory(target: Target) -> None:
    for seed in target.seeds()[:2]:
        for data in blown_up(seed, LONG_BYTES):
            target.accepts_in_bounded_memory(data)


def _for_two_seconds(data: bytes) -> None:
    end_s = time.process_time() + 2
    while time.process_time() < end_s:
        pass


def test_a_parser_that_takes_long_for_a_short_input_is_noticed() -> None:
    slow = Target("slow", _for_two_seconds, list)
    with pytest.raises(TimeoutError, match="slow: 4 bytes took"):
        slow.accepts(b"tiny")


def test_a_parser_that_takes_much_memory_is_noticed() -> None:
    greedy = Target("greedy", lambda data: bytearray(len(data) << 12), list)
    with pytest.raises(MemoryError, match="greedy: 65536 bytes took 256 MiB"):
        greedy.accepts_in_bounded_memory(b"c" * LONG_BYTES)


class TestRuns:
    """The long runs, with Atheris in processes of their own."""

    def test_costly_targets_get_fewer_of_the_inputs(self) -> None:
        targets = {
            "cheap": Target("cheap", bytes, list),
            "costly": Target("costly", bytes, list, cost=3),
        }
        assert shares(targets, 4000) == {"cheap": 3000, "costly": 1000}

    @pytest.mark.slow
    def test_a_run_keeps_what_it_found_and_goes_on_where_it_stopped(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("atheris", reason="`make soak` installs Atheris")
        chosen, folder = {"duration": TARGETS["duration"]}, Folder(tmp_path)
        run(chosen, 500, folder)
        assert folder.done() == {"duration": 500}
        assert len(list(folder.corpus(TARGETS["duration"]).iterdir())) > 2
        run(chosen, 800, folder)
        assert folder.done() == {"duration": 800}
        assert list((tmp_path / "found").iterdir()) == []
        assert capfd.readouterr().out == "500 of 500 inputs\n800 of 800 inputs\n"

    @pytest.mark.slow
    def test_a_run_that_breaks_a_parser_keeps_the_input(self, tmp_path: Path) -> None:
        pytest.importorskip("atheris", reason="`make soak` installs Atheris")
        broken = Target("broken", bytes, lambda: [b"seed"])
        with pytest.raises(FoundError, match="broken"):
            run({"broken": broken}, 10, Folder(tmp_path))
