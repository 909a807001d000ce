"""Notifications: HTTP pings at the start and the end of a run, and a command for a mail or a messenger.

None of them changes the outcome of a run. Each has a time limit, and a failure is logged without the path of
the URL, which is often its only secret.
"""

from __future__ import annotations

import http.client
import logging
import queue
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from enum import StrEnum
from urllib.parse import urlsplit, urlunsplit

from casfs import __version__
from casfs.config.profiles import Notification
from casfs.config.values import PingUrl
from casfs.run.outcome import Outcome

log = logging.getLogger(__name__)

_MAX_BODY_BYTES = 10_000
"""The most bytes of a body that healthchecks.io stores; the rest is not sent."""

_COMMAND_TIMEOUT_S = 120.0
_STDERR = 2


class Ping(StrEnum):
    """The kind of a ping; the value is the suffix of the URL's path."""

    START = "/start"
    SUCCESS = ""
    FAILURE = "/fail"


class Pinger:
    """Send pings to one URL: at most `attempts` requests of `timeout_s` each, all within `patience_s`."""

    def __init__(
        self,
        url: PingUrl,
        attempts: int = 3,
        timeout_s: float = 10.0,
        patience_s: float = 40.0,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._url = url
        self._attempts = attempts
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._pause = pause

    def hurried(self, patience_s: float) -> Pinger:
        """Return a sender of the same pings that makes one attempt, within `patience_s` seconds."""
        return Pinger(self._url, 1, min(patience_s, self._timeout_s), patience_s, self._pause)

    def send(self, ping: Ping, text: str) -> bool:
        """Send a ping and return whether it arrived. Raises nothing."""
        result: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # A name server or a slow answer can take longer than any timeout of a socket.
        thread = threading.Thread(
            target=lambda: result.put(self._try(ping, text)), name="casfs-ping", daemon=True
        )
        thread.start()
        try:
            reason = result.get(timeout=self._patience_s)
        except queue.Empty:
            reason = f"there was no answer within {self._patience_s:.0f} s"
        if reason is not None:
            log.warning("the ping to %s failed: %s", self._url.host, reason)
        return reason is None

    def _try(self, ping: Ping, text: str) -> str | None:
        """Send a ping; return None if it arrived, else the reason why the last attempt failed."""
        reason = "it was not tried"
        for attempt in range(self._attempts):
            if attempt:
                self._pause(2.0**attempt)
            request = urllib.request.Request(
                ping_url(self._url.text, ping),
                data=text.encode("utf-8", "replace")[:_MAX_BODY_BYTES],
                headers={
                    "Content-Type": "text/plain; charset=utf-8",
                    "User-Agent": f"casfs/{__version__}",
                },
                method="POST",
            )
            try:
                with urllib.request.urlopen(request, timeout=self._timeout_s):
                    return None
            except urllib.error.HTTPError as error:
                error.close()
                reason = f"the server answered {error.code} {error.reason}"
                if 400 <= error.code < 500 and error.code not in (408, 429):
                    return reason
            except urllib.error.URLError as error:
                reason = str(error.reason)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(error) or type(error).__name__
        return reason


def ping_url(url: str, ping: Ping) -> str:
    """Return the URL of a ping: the suffix belongs to the path, before a query."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") + ping) if ping else parts)


def is_wanted(notification: Notification, outcome: Outcome) -> bool:
    """Return whether the command should run after this outcome."""
    if notification.on == "always":
        return True
    if notification.on == "failure":
        return outcome is Outcome.FAILED
    return outcome is not Outcome.SUCCESS


def run_notification(
    notification: Notification,
    text: str,
    environment: Mapping[str, str],
    timeout_s: float = _COMMAND_TIMEOUT_S,
) -> bool:
    """Run the command in a shell with the summary on its standard input; return whether it succeeded."""
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", notification.command.text],
            input=text.encode("utf-8", "replace"),
            stdout=_STDERR,
            env=dict(environment),
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        log.warning("the notify command was ended: it took more than %.0f s", timeout_s)
        return False
    except OSError as error:
        log.warning("the notify command could not be run: %s", error)
        return False
    if done.returncode:
        log.warning("the notify command failed with exit %d", done.returncode)
    return done.returncode == 0
