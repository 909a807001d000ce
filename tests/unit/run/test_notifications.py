"""Pings and the notify command: what arrives, and that nothing they do ends a run."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from casfs.config.profiles import Notification
from casfs.config.values import Command, PingUrl
from casfs.run.notifications import Ping, Pinger, is_wanted, ping_url, run_notification
from casfs.run.outcome import Outcome
from tests.support.ping_server import PingServer, serving_pings


@pytest.fixture
def server() -> Iterator[PingServer]:
    with serving_pings() as found:
        yield found


class Pauses:
    """Pauses that take no time and are counted."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def pinger(url: str, pauses: Pauses, **options: float) -> Pinger:
    return Pinger(PingUrl(url), pause=pauses, **options)  # type: ignore[arg-type]


def test_start_success_and_failure_have_paths_of_their_own(server: PingServer) -> None:
    sender = pinger(f"{server.url}/uuid?create=1", Pauses())
    for ping in Ping:
        assert sender.send(ping, f"text of {ping.name} é")
    assert server.requests == [
        ("POST", "/uuid/start?create=1", "text of START é"),
        ("POST", "/uuid?create=1", "text of SUCCESS é"),
        ("POST", "/uuid/fail?create=1", "text of FAILURE é"),
    ]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://hc/ping/uuid", "https://hc/ping/uuid/fail"),
        ("https://hc/ping/uuid/", "https://hc/ping/uuid/fail"),
        ("https://hc", "https://hc/fail"),
        ("https://hc/x?a=b#c", "https://hc/x/fail?a=b#c"),
    ],
)
def test_the_suffix_belongs_to_the_path(url: str, expected: str) -> None:
    assert ping_url(url, Ping.FAILURE) == expected
    assert ping_url(url, Ping.SUCCESS) == url


def test_a_body_is_cut_to_what_a_server_keeps(server: PingServer) -> None:
    assert pinger(server.url, Pauses()).send(Ping.SUCCESS, "x" * 50_000)
    assert len(server.requests[0][2]) == 10_000


def test_a_ping_is_sent_again_after_an_error_of_the_server(server: PingServer) -> None:
    server.answers += [503, 429]
    pauses = Pauses()
    assert pinger(f"{server.url}/a", pauses).send(Ping.SUCCESS, "")
    assert server.paths == ["/a"] * 3
    assert pauses.seconds == [2.0, 4.0]


def test_a_ping_that_is_refused_is_given_up_and_its_path_is_not_logged(
    server: PingServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers += [404]
    assert not pinger(f"{server.url}/secret-uuid", Pauses()).send(Ping.START, "")
    assert server.paths == ["/secret-uuid/start"]
    assert f"the ping to {server.url}/… failed: the server answered 404" in caplog.text
    assert "secret" not in caplog.text


def test_a_server_that_cannot_be_reached_is_tried_three_times(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        pauses = Pauses()
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/uuid"
        assert not pinger(url, pauses).send(Ping.SUCCESS, "")
    assert len(pauses.seconds) == 2
    assert "failed: " in caplog.text


def test_a_server_that_never_answers_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        assert not pinger(url, Pauses(), timeout_s=60.0, patience_s=0.2).send(Ping.SUCCESS, "")
    assert time.monotonic() - start < 30
    assert "no answer within" in caplog.text


def test_a_hurried_ping_is_tried_once(server: PingServer) -> None:
    server.answers += [503, 503]
    assert not pinger(server.url, Pauses()).hurried(5.0).send(Ping.FAILURE, "")
    assert server.paths == ["/fail"]


@pytest.mark.parametrize(
    ("on", "outcomes"),
    [
        ("always", {Outcome.SUCCESS, Outcome.WARNING, Outcome.FAILED}),
        ("problems", {Outcome.WARNING, Outcome.FAILED}),
        ("failure", {Outcome.FAILED}),
    ],
)
def test_the_command_is_wanted_after_the_runs_that_it_names(
    on: str, outcomes: set[Outcome]
) -> None:
    notification = Notification(command=Command("true"), on=on)  # type: ignore[arg-type]
    assert {outcome for outcome in Outcome if is_wanted(notification, outcome)} == outcomes


def test_the_command_gets_the_text_on_its_standard_input(tmp_path: Path) -> None:
    command = Notification(command=Command(f'cat > "{tmp_path}/mail"; echo $CASFS_EXIT >&2'))
    assert run_notification(command, "it failed\n", {**os.environ, "CASFS_EXIT": "1"})
    assert (tmp_path / "mail").read_text() == "it failed\n"


def test_a_command_that_fails_or_hangs_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert not run_notification(Notification(command=Command("exit 3")), "", dict(os.environ))
    assert "failed with exit 3" in caplog.text
    hanging = Notification(command=Command("exec sleep 1000"))
    assert not run_notification(hanging, "", dict(os.environ), timeout_s=0.2)
    assert "took more than" in caplog.text
