"""The remote benchmark's line, counts and report."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bench.remote.http_counter import HttpCounter
from bench.remote.large_repository import Shape, write_repository
from bench.remote.line import Line, LineSettings, line_to
from bench.remote.results import (
    RemoteRun,
    RemoteSample,
    RemoteWork,
    load_run,
    render_run,
    save_run,
)
from bench.remote.source import SMALL_FILES, make_source
from casfs.maintenance.check import Checker
from casfs.maintenance.scrub import PackSelection
from casfs.monitor import RecordingMonitor
from casfs.repository.opening import open_for_reading
from casfs.repository.place import LocalPlace
from casfs.storage.url import parse_address

FAST = LineSettings(0.0, 10_000_000_000)

REQUESTS = (
    b"PUT /a HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\nGET / HTTP/1"
    b"GET /b HTTP/1.1\r\nHost: x\r\n\r\n"
    b"POST /c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nGET /\r\n3;ext=1\r\n\r\n\r\r\n0\r\n\r\n"
    b"GET /d HTTP/1.1\r\n\r\n"
)


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
def test_requests_are_counted_however_their_bytes_are_cut(piece: int) -> None:
    counter = HttpCounter()
    for begin in range(0, len(REQUESTS), piece):
        counter.feed(REQUESTS[begin : begin + piece])
    assert counter.methods == {"PUT": 1, "GET": 2, "POST": 1}


class _Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that returns what it gets."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


@contextmanager
def connected(line: Line) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", line.port, timeout=60)
    try:
        yield connection
    finally:
        connection.close()


def put(connection: http.client.HTTPConnection, body: bytes) -> float:
    """Put a body, require it back, and return the seconds that it took."""
    began = time.monotonic()
    connection.request("PUT", "/x", body)
    assert connection.getresponse().read() == body
    return time.monotonic() - began


def test_a_line_passes_everything_on_and_counts_it(echo: int) -> None:
    body = bytes(range(256)) * 20_000
    with line_to(echo, FAST) as line, connected(line) as connection:
        for _ in range(3):
            put(connection, body)
        totals = line.totals()
    assert totals.methods == {"PUT": 3}
    assert totals.requests == 3
    assert 3 * len(body) < totals.sent_bytes < 3 * len(body) + 1000
    assert 3 * len(body) < totals.received_bytes < 3 * len(body) + 1000


def test_a_round_trip_takes_its_time_and_a_connection_takes_one_more(echo: int) -> None:
    with line_to(echo, LineSettings(0.2, 10_000_000_000)) as line, connected(line) as connection:
        assert put(connection, b"x") >= 0.4
        assert put(connection, b"x") >= 0.2


def test_the_bandwidth_is_that_of_all_connections_together(echo: int) -> None:
    body = bytes(1_000_000)
    began = time.monotonic()
    with line_to(echo, LineSettings(0.0, 40_000_000)) as line:

        def send() -> None:
            with connected(line) as connection:
                put(connection, body)

        threads = [threading.Thread(target=send) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # 3 MB at 5 MB/s, and both directions at the same time.
    assert time.monotonic() - began >= 0.6


def test_a_line_to_a_port_without_a_server_closes_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    errors = (http.client.HTTPException, OSError)
    with line_to(port, FAST) as line, connected(line) as connection, pytest.raises(errors):
        put(connection, b"x")


def test_a_source_is_the_same_every_time(tmp_path: Path) -> None:
    first = make_source(tmp_path / "a", 20 << 20)
    again = make_source(tmp_path / "b", 20 << 20)
    assert len(list(first.small.iterdir())) == SMALL_FILES
    assert first.total_bytes == again.total_bytes > 19 << 20
    assert first.one.read_bytes() == again.one.read_bytes()
    assert sum(path.stat().st_size for path in first.half) * 2 < first.total_bytes


def test_a_report_has_a_row_for_each_work_and_names_what_failed(tmp_path: Path) -> None:
    sample = RemoteSample(50, 100, "casfs", RemoteWork.FIRST.value, 2.5, 20, 25_000_000, 1000, 9)
    failed = replace(sample, program="restic", work=RemoteWork.PRUNE.value, failure="it broke")
    run = RemoteRun(
        *("2026-11-28", "2 cores", "weed"), {"casfs": "casfs 1", "restic": "restic 2"}, 64_000_000
    )
    save_run(replace(run, samples=(sample, failed)), tmp_path / "results.json")
    text = render_run(load_run(tmp_path / "results.json"))
    assert text.count("\n| ") == 1 + len(RemoteWork)
    assert "### 50 ms, 100 Mbit/s" in text
    # 25 MB at 100 Mbit/s.
    assert "| first backup | 2.50 s | 20 | 25.0 MB | 0.0 MB | 0 MB | – |" in text
    assert "| 2.0 s |" in text
    assert "- restic, prune of half, 50 ms, 100 Mbit/s: it broke" in text


def test_a_large_repository_has_the_blobs_that_were_asked_for_and_is_intact(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path / "repository")
    shape = Shape(files=2000, changed=40, hosts=2, days=3)
    blobs = write_repository(parse_address(str(place.root)), shape)
    # Files, folders, groups and roots of the first day; then what a change of 40 files in 4 folders stores.
    assert blobs == 2 * ((2000 + 100 + 1 + 1) + 2 * (40 + 4 + 1 + 1))
    with open_for_reading(place) as repository:
        result = Checker(repository, RecordingMonitor()).check(PackSelection())
    assert (result.snapshots, result.files, result.damage) == (6, 2 * (2000 + 2 * 4 * 20), [])
