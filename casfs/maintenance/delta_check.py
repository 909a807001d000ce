"""Compare the index deltas with the packs: what each says of a pack must be what the pack's directory says.

Deltas are derived. A finding is no loss of data; it means that other hosts take longer, and `repair index`
writes the deltas again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from blake3 import blake3

from casfs.digest import short_id
from casfs.errors import CasfsError, DeltaError, KeyMissingError, NotFoundError
from casfs.format.delta import Delta, DeltaName
from casfs.format.pack import PackEntry, PackRef
from casfs.maintenance.findings import Finding
from casfs.repository.repository import Repository
from casfs.store.delta_reader import list_deltas

_ADVICE = "run `casfs repair index`"


def directory_digest(entries: Iterable[PackEntry]) -> bytes:
    """Return 16 bytes that identify the entries of a pack, in any order."""
    hasher = blake3()
    for e in sorted(entries, key=PackEntry.place):
        hasher.update(e.pack())
        hasher.update(e.offset.to_bytes(8, "little"))
    return hasher.digest(16)


def check_deltas(
    repository: Repository, packs: Mapping[PackRef, tuple[int, bytes]]
) -> list[Finding]:
    """Return a finding for each delta that cannot be read or contradicts a pack.

    `packs` are the packs with an intact directory: their size in bytes, and `directory_digest` of their
    entries. Deltas that are encrypted with other keys, and those that another delta replaces, are skipped.
    """
    found: list[Finding] = []
    if not repository.config.has_deltas:
        return found
    listed = list_deltas(repository.store.storage)
    replaced: set[DeltaName] = set()
    names = (name for name in sorted(listed, reverse=True) if name not in replaced)
    for name, delta in repository.delta_sync.reader.read_all(names, listed):
        if name in replaced or isinstance(delta, KeyMissingError | NotFoundError):
            continue
        if isinstance(delta, CasfsError):
            found.append(Finding("delta", f"{delta}; {_ADVICE}"))
            continue
        replaced.update(one for one in delta.replaced if one < name)
        try:
            found += _contradictions(delta, packs)
        except DeltaError as error:
            found.append(Finding("delta", f"{error}; {_ADVICE}"))
    return found


def _contradictions(delta: Delta, packs: Mapping[PackRef, tuple[int, bytes]]) -> Iterable[Finding]:
    for pack in delta.packs():
        expected = packs.get(pack.pack)
        if expected is not None and expected != (pack.pack_bytes, directory_digest(pack.entries)):
            message = f"{delta.name} contradicts the directory of pack {short_id(pack.pack.id)}"
            yield Finding("delta", f"{message}; {_ADVICE}", pack=pack.pack.id)
