"""The streams on which a write is complete or an error."""

from __future__ import annotations

import io
import os
import threading

import pytest

from casfs.cli.standard_streams import CompleteWriter, OutputError


def test_a_write_to_a_pipe_that_does_not_block_is_complete() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    content = os.urandom(1_000_000)
    found = bytearray()

    def read_all() -> None:
        with open(reading, "rb", buffering=0) as pipe:
            while data := pipe.read(10_000):
                found.extend(data)

    reader = threading.Thread(target=read_all)
    reader.start()
    assert CompleteWriter(writing, raises=True).write(content) == len(content)
    os.close(writing)
    reader.join()
    assert found == content


def test_the_first_error_is_raised_and_later_output_is_dropped() -> None:
    with open("/dev/full", "wb") as full:
        writer = CompleteWriter(full.fileno(), raises=True)
        with pytest.raises(OutputError) as caught:
            writer.write(b"lost")
        assert writer.write(b"more") == 4
    assert caught.value.cause is writer.error


def test_an_error_is_kept_where_the_command_goes_on() -> None:
    with open("/dev/full", "wb") as full:
        writer = CompleteWriter(full.fileno(), raises=False)
        text = io.TextIOWrapper(io.BufferedWriter(writer))
        text.write("lost")
        text.flush()
        text.close()
    assert writer.error is not None
