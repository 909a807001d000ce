"""Types of values in the configuration beyond those of TOML, validated when the file is read."""

from __future__ import annotations

import os
import re
from fractions import Fraction
from typing import Any
from urllib.parse import urlsplit

from casfs.errors import UsageError
from casfs.maintenance.retention import CalendarSpan, parse_duration

URL_SCHEMES = ("file", "s3", "gs", "az", "sftp")

_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*([kmgtp]?)(?:i?b)?", re.IGNORECASE)
_TOML_TYPES = {bool: "true or false", int: "an integer", float: "a number", list: "an array"}


class ConfigText:
    """A string with a syntax of its own; `text` is the string in the file."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        if not text or "\0" in text:
            raise ValueError("must be a text that is not empty and has no NUL")
        self.text = text

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.text == self.text

    def __hash__(self) -> int:
        return hash((type(self), self.text))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"


class Duration(ConfigText):
    """A length of time such as 30d, 12h or 10m."""

    __slots__ = ("seconds",)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        try:
            self.seconds = parse_duration(text, "")
        except UsageError:
            raise ValueError(f"{text!r} is not a length of time such as 30d, 12h or 10m") from None


class SpanText(ConfigText):
    """A length of time by the calendar such as 1y6m or 30d, where m are months."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        try:
            CalendarSpan(text, "")
        except UsageError:
            raise ValueError(f"{text!r} is not a length of time such as 1y6m or 30d") from None


class Size(ConfigText):
    """A number of bytes with an optional binary unit, such as 500K or 2G."""

    __slots__ = ("bytes",)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        match = _SIZE.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a size such as 500K, 10M or 2G")
        power = " kmgtp".index(match[2].lower()) if match[2] else 0
        self.bytes = int(Fraction(match[1]) * 1024**power)


class Share(ConfigText):
    """A percentage above 0% and up to 100%."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        try:
            percent = float(text.removesuffix("%"))
        except ValueError:
            percent = 0.0
        if not 0 < percent <= 100:
            raise ValueError(f"{text!r} is not a percentage such as 5%, above 0% and up to 100%")


class Command(ConfigText):
    """A command that is run in a shell or split into words, as the key that holds it documents."""


class AbsolutePath(ConfigText):
    """A path that does not depend on the current folder; a leading ~ is the user's home."""

    __slots__ = ("path",)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.path = os.path.expanduser(text)
        if not os.path.isabs(self.path):
            raise ValueError(f"{text!r} must be an absolute path, or begin with ~/")


class RepositoryUrl(ConfigText):
    """The address of a repository: an absolute path, or a URL without any secret.

    `url` is the same with the user's home in place of a leading ~.
    """

    __slots__ = ("url",)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        scheme, separator, _ = text.partition("://")
        if not separator:
            self.url = AbsolutePath(text).path
            return
        if scheme not in URL_SCHEMES:
            raise ValueError(
                f"{scheme}:// is not a kind of repository; there are a path and "
                + ", ".join(f"{known}://" for known in URL_SCHEMES)
            )
        _refuse_secrets(text)
        self.url = text


class PingUrl(ConfigText):
    """An http or https URL that is requested when a run starts, succeeds and fails."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        if not text.isascii() or any(letter.isspace() or letter < " " for letter in text):
            raise ValueError("must be a URL without spaces and other than ASCII characters")
        _refuse_secrets(text)
        parts = urlsplit(text)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an http:// or https:// URL")

    @property
    def host(self) -> str:
        """Return the URL without its path, which is often its only secret."""
        parts = urlsplit(self.text)
        return f"{parts.scheme}://{parts.netloc}/…"


class Tag(ConfigText):
    """A snapshot's tag."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        if "," in text:
            raise ValueError(f"{text!r} has a comma; give several tags as items of the array")


def convert_value(kind: type, value: Any) -> Any:
    """Convert a value to one of the classes above, as msgspec's hook. Raises ValueError."""
    if not issubclass(kind, ConfigText):
        raise NotImplementedError(kind)
    if not isinstance(value, str):
        found = _TOML_TYPES.get(type(value), "another type")
        raise ValueError(f"expected a string, not {found}")
    return kind(value)


def _refuse_secrets(text: str) -> None:
    try:
        parts = urlsplit(text)
        has_port = parts.port is None or parts.port > 0
    except ValueError as error:
        raise ValueError(f"is not a URL: {error}") from None
    if parts.password is not None:
        raise ValueError("a URL must not hold a password; name a command or a file for it")
    if not has_port:
        raise ValueError("is not a URL: the port is 0")


def is_on_network(url: RepositoryUrl) -> bool:
    """Return whether the address of a repository is on another machine."""
    scheme, separator, rest = url.url.partition("://")
    if not separator or scheme == "file":
        return False
    host = urlsplit(url.url).hostname if scheme == "sftp" else rest
    return host not in ("localhost", "127.0.0.1", "::1")
