"""Which blobs share a pack and a payload: the records of a batch, planned before they are compressed.

Small data blobs that were put one after another go into a group: they have much in common, and a frame for
each would cost space. A larger blob has a payload of its own. So has a tree or a content list: a damaged byte
must not cost more than one directory, and groups of trees would hardly save anything. Large content that does
not compress is stored raw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from casfs.digest import Digest
from casfs.format.codec import BlobCodec, BlobKind, Codec
from casfs.format.group import MAX_GROUP_BLOBS, join_group
from casfs.format.pack import METADATA_KINDS

GROUP_BYTES = 256 * 1024
"""The target size of a group's blobs; docs/benchmark-notes.md has the measurements."""


@dataclass(frozen=True, slots=True)
class PackLayout:
    """How a repository's format packs blobs.

    With `separates_metadata` trees and content lists go into metadata packs. Data blobs of at most half of
    `group_bytes` are grouped; with 0 each blob has a payload of its own.
    """

    separates_metadata: bool = False
    group_bytes: int = 0


FORMAT_1 = PackLayout()
FORMAT_2 = PackLayout(separates_metadata=True, group_bytes=GROUP_BYTES)


class NewBlob(NamedTuple):
    """A blob to store; `domain` is the index of the domain that keys its digest."""

    kind: BlobKind
    digest: Digest
    plain: bytes
    domain: int = 0


class NewRecord(NamedTuple):
    """A payload to store and the blobs in it, which are of one kind and one domain."""

    blobs: list[NewBlob]
    codec: Codec
    payload: bytes
    plain_bytes: int


def encode_records(
    codec: BlobCodec, blobs: Sequence[NewBlob], layout: PackLayout
) -> list[NewRecord]:
    """Return the compressed records of a batch of blobs."""
    if layout.group_bytes:
        raw, planned = _plan(codec, blobs, layout.group_bytes)
    else:
        raw, planned = [], [[blob] for blob in blobs]
    plains = [
        join_group([blob.plain for blob in group]) if len(group) > 1 else group[0].plain
        for group in planned
    ]
    records: list[NewRecord] = []
    for group, plain, (used, payload) in zip(
        planned, plains, codec.encode_many(plains), strict=True
    ):
        if len(group) == 1:
            records.append(NewRecord(group, used, payload, len(plain)))
        elif len(payload) < sum(len(blob.plain) for blob in group):
            records.append(NewRecord(group, Codec.GROUP, payload, len(plain)))
        else:
            raw += group
    records += [NewRecord([blob], Codec.RAW, blob.plain, len(blob.plain)) for blob in raw]
    return records


def _plan(
    codec: BlobCodec, blobs: Sequence[NewBlob], group_bytes: int
) -> tuple[list[NewBlob], list[list[NewBlob]]]:
    """Return the blobs to store as they are, and those of each compressed record."""
    raw: list[NewBlob] = []
    planned: list[list[NewBlob]] = []
    small: dict[int, list[NewBlob]] = {}
    for blob in blobs:
        if codec.looks_incompressible(blob.plain):
            raw.append(blob)
        elif blob.kind in METADATA_KINDS or len(blob.plain) > group_bytes // 2:
            planned.append([blob])
        else:
            small.setdefault(blob.domain, []).append(blob)
    for alike in small.values():
        planned += _groups(alike, group_bytes)
    return raw, planned


def _groups(blobs: list[NewBlob], group_bytes: int) -> Iterator[list[NewBlob]]:
    """Yield groups of similar sizes, each of at most `group_bytes` bytes of blobs."""
    total_bytes = sum(len(blob.plain) for blob in blobs)
    enough_bytes = total_bytes / max(1, math.ceil(total_bytes / group_bytes))
    group: list[NewBlob] = []
    size = 0
    for blob in blobs:
        if group and size + len(blob.plain) > group_bytes:
            yield group
            group, size = [], 0
        group.append(blob)
        size += len(blob.plain)
        if size >= enough_bytes or len(group) == MAX_GROUP_BLOBS:
            yield group
            group, size = [], 0
    if group:
        yield group
