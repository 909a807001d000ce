"""JSON that others wrote: one error for everything that can be wrong with it."""

from __future__ import annotations

from typing import TypeVar

import msgspec

T = TypeVar("T")


class InvalidJsonError(ValueError):
    """Bytes are no JSON document of the expected form; the message is a clause that says why."""


def parse_json(data: bytes, kind: type[T]) -> T:
    """Return a JSON document as a value of a type; raise InvalidJsonError.

    Bytes that are not UTF-8, and a document that is nested too deeply, are no exceptions: msgspec has other
    errors for them, which a caller easily forgets.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except UnicodeDecodeError as error:
        raise InvalidJsonError("it is not UTF-8") from error
    except RecursionError as error:
        raise InvalidJsonError("it is nested too deeply") from error
    except msgspec.DecodeError as error:
        raise InvalidJsonError(str(error)) from error
