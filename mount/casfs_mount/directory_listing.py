"""Replies to readdir: the entries of a directory from a position on, as many as fit.

Position 0 is `.`, 1 is `..`, and the entries of the view follow at their position there plus 2.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import chain, islice
from typing import NamedTuple

import pyfuse3

from casfs.errors import CasfsError
from casfs.format.tree import Node
from casfs_mount.attributes import Attributes
from casfs_mount.event_loop_guard import WouldBlock
from casfs_mount.inodes import HARD_LINKS, HardLinks
from casfs_mount.logged_name import LoggedName
from casfs_mount.view import View

log = logging.getLogger(__name__)

_LISTED_NAME_BYTES = 1024
"""FUSE_NAME_MAX of most kernels, which refuse the whole listing if one name is longer."""

_BATCH_ENTRIES = 256
"""Entries that a worker thread collects from an uncached directory for one reply."""


class Listing(NamedTuple):
    """A directory from a position on: `.` and `..` with their names, then the entries that the view gives."""

    dots: tuple[tuple[bytes, int, Node, int], ...]
    entries: Iterable[tuple[int, Node, int]]


class DirectoryLister:
    """Lists the directories of a view. `attributes` and `links` are those of all replies of the mount."""

    def __init__(self, view: View, attributes: Attributes, links: HardLinks) -> None:
        self._view = view
        self._attributes = attributes
        self._links = links

    def list(self, directory: int, start: int) -> Listing:
        """Return the entries from a position on; raise WouldBlock if the first one has to be read."""
        view = self._view
        entries = view.entries(directory, max(start - 2, 0))
        if start > 1:
            return Listing((), entries)
        # The first entry raises WouldBlock, if anything does, before a reply is filled.
        first = list(islice(entries, 1))
        # Of both the kernel uses only the number and the type.
        node = view.node(directory)
        dots = (b".", directory, node, 1), (b"..", view.parent(directory), node, 2)
        return Listing(dots[start:], chain(first, entries))

    def gather(self, directory: int, start: int) -> Listing:
        """Return the entries from a position on, read on this thread, enough for one reply."""
        listing = self.list(directory, start)
        return listing._replace(entries=list(islice(listing.entries, _BATCH_ENTRIES)))

    def reply(self, directory: int, listing: Listing, token: pyfuse3.ReaddirToken) -> None:
        """Add entries to a reply until it is full; count the hard links among them."""
        attributes = self._attributes
        attributes.set_timeout(self._view.is_immutable(directory))
        entry, fill, add = attributes.entry, attributes.fill, pyfuse3.readdir_reply
        for name, number, node, after in listing.dots:
            fill(number, node)
            if not add(token, name, entry, after):
                return
        replied = bool(listing.dots)
        try:
            for position, node, after in listing.entries:
                name = node.name
                if len(name) > _LISTED_NAME_BYTES:
                    self._warn_of_long_name(directory, name)
                    continue
                number = fill(position, node)
                if not add(token, name, entry, after + 2):
                    return
                replied = True
                if number >= HARD_LINKS:
                    self._links.remember(number, position)
        except (WouldBlock, CasfsError):
            # Return the entries so far; the next request begins at the one that failed.
            if not replied:
                raise

    def _warn_of_long_name(self, directory: int, name: bytes) -> None:
        log.warning(
            "%s holds a name of %d bytes, which the kernel cannot list; restore it with "
            "casfs restore, or read it with casfs dump",
            LoggedName(self._view.describe(directory)),
            len(name),
        )
