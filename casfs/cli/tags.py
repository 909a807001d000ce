"""Tags as they are given on the command line: one, or several with commas between."""

from __future__ import annotations

from collections.abc import Iterable

from casfs.errors import UsageError


def tags_in(texts: Iterable[str]) -> set[str]:
    """Return the tags that a snapshot is to have, or has where it is to be kept.

    A comma parts them everywhere, so that no snapshot gets a tag which could not be asked for. Raises
    UsageError for one without a name.
    """
    found = {tag for text in texts for tag in text.split(",")}
    if "" in found:
        raise UsageError("a tag without a name cannot be given")
    return found
