"""What a command says: nothing that a name holds can forge a line, and JSON loses no byte."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from casfs.cli.output import Output, format_time, iso_time, json_path, path_argument
from casfs.cli.param_types import SIZE
from casfs.digest import short_id
from casfs.display import escape_path, format_size, single_line

HOSTILE = [
    b"two\nlines",
    b"\r\x1b[2Jgone",
    b"\xff\xfe",
    b"a\\nb",
    b"tab\there",
    b"\x7f",
    "right \u202e to left".encode(),
    "no\u00a0break".encode(),
    "\u2028\u2029\x85".encode(),
    b"\xed\xa0\x80",
    b"casfs: everything is fine\n",
]


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A time zone far from most test machines'."""
    monkeypatch.setenv("TZ", "NPT-5:45")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


class TestEscapePath:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_an_escaped_path_is_one_line_of_printable_characters(self, name: bytes) -> None:
        text = escape_path(name)
        assert text.isprintable()
        assert len(text.splitlines()) == 1

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            (b"plain name.txt", "plain name.txt"),
            ("häst 馬".encode(), "häst 馬"),
            (b"two\nlines", r"two\nlines"),
            (b"a\tb\rc", r"a\tb\rc"),
            (b"\x1b[31m\0\x7f", r"\x1b[31m\x00\x7f"),
            (b"\xff-\xc3", r"\xff-\xc3"),
            (b"back\\slash", r"back\\slash"),
            ("\u202e".encode(), r"\u202e"),
            ("\U000e0001".encode(), r"\U000e0001"),
            (b"", ""),
        ],
    )
    def test_a_path_is_escaped_only_where_necessary(self, name: bytes, text: str) -> None:
        assert escape_path(name) == text

    @given(st.lists(st.binary(max_size=8), min_size=2, max_size=2, unique=True))
    def test_different_paths_never_look_alike(self, names: list[bytes]) -> None:
        assert escape_path(names[0]) != escape_path(names[1])

    @given(st.one_of(st.binary(max_size=30), st.text(max_size=30).map(str.encode)))
    def test_an_escaped_path_of_any_bytes_is_printable(self, name: bytes) -> None:
        assert escape_path(name).isprintable()

    @given(st.text(max_size=30))
    def test_a_sentence_with_a_name_stays_one_line(self, sentence: str) -> None:
        assert single_line(sentence).isprintable()
        assert single_line(single_line(sentence)) == single_line(sentence)


class TestJsonOutput:
    @pytest.mark.parametrize("name", [b"plain", b"", "häst".encode(), *HOSTILE])
    def test_json_keeps_every_byte_of_a_path(self, name: bytes) -> None:
        line = json.dumps(json_path(name))
        assert line.isascii()
        assert len(line.splitlines()) == 1
        reported = json.loads(line)
        assert reported["path"].encode("utf-8", "surrogateescape") == name
        if "path_b64" in reported:
            assert base64.b64decode(reported["path_b64"]) == name
        assert ("path_b64" in reported) is (name in (b"\xff\xfe", b"\xed\xa0\x80"))

    def test_json_path_names_another_field_in_both_forms(self) -> None:
        assert set(json_path(b"\xff", "target")) == {"target", "target_b64"}

    def test_json_output_is_one_typed_object_a_line_and_no_text(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = Output(as_json=True)
        output.line("for people")
        output.emit("node", path="a\nb", size=5)
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
            {"type": "node", "path": "a\nb", "size": 5}
        ]

    def test_text_output_shows_no_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        output = Output(as_json=False)
        output.line("for people")
        output.emit("node", path="x")
        assert capsys.readouterr().out == "for people\n"


@pytest.mark.parametrize("as_json", [True, False])
def test_a_warning_is_one_line_on_standard_error_whatever_it_names(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    Output(as_json).warn("the file a\ncasfs: all is well is damaged")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "casfs: the file a\\ncasfs: all is well is damaged\n"


class TestFormatting:
    @pytest.mark.parametrize(
        ("size", "text"),
        [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (5 << 20, "5.0 MiB"),
            (3 << 40, "3.0 TiB"),
            (7 << 60, "7168.0 PiB"),
            (-2048, "-2.0 KiB"),
        ],
    )
    def test_a_formatted_size_has_a_unit(self, size: int, text: str) -> None:
        assert format_size(size) == text

    def test_a_short_id_is_the_beginning_of_the_id(self) -> None:
        assert short_id(bytes(range(32))) == "000102030405"

    def test_formatted_times_are_local_and_json_times_have_their_offset(self, zone: None) -> None:
        time_ns = 1_700_000_000_500_000_000
        assert format_time(time_ns) == "2023-11-15 03:58:20"
        assert iso_time(time_ns) == "2023-11-15T03:58:20.500000+05:45"
        assert format_time(-1) == "1970-01-01 05:44:59"

    @pytest.mark.parametrize("time_ns", [10**30, -(10**30), (1 << 64) - 1, -(1 << 63)])
    def test_times_beyond_the_calendar_are_formatted_without_an_error(self, time_ns: int) -> None:
        assert format_time(time_ns)
        assert iso_time(time_ns)


class TestParameterTypes:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("0", 0),
            ("1048576", 1 << 20),
            ("1024K", 1 << 20),
            ("1M", 1 << 20),
            ("1MiB", 1 << 20),
            ("1 mb", 1 << 20),
            ("1.5G", 3 << 29),
            ("2t", 2 << 40),
            (" 10B ", 10),
            ("9007199254740993", 9_007_199_254_740_993),
            ("9" * 20, int("9" * 20)),
        ],
    )
    def test_a_size_argument_is_exact(self, text: str, size: int) -> None:
        assert SIZE.convert(text, None, None) == size
        assert SIZE.convert(size, None, None) == size

    @pytest.mark.parametrize(
        "text", ["", "M", "-1", "1X", "1,5M", "0x10", "1e6", "1 M M", "inf", "9" * 21, "9" * 5000]
    )
    def test_an_invalid_size_is_refused_with_an_example(self, text: str) -> None:
        with pytest.raises(click.BadParameter, match="such as 500K, 10M or 2G"):
            SIZE.convert(text, None, None)

    def test_a_path_argument_keeps_its_bytes(self) -> None:
        assert path_argument(os.fsdecode(b"\xff\n")) == b"\xff\n"
