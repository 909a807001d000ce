"""How the commands print the replacements of a repository's secret."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from casfs.cli.output import Output
from casfs.display import escape_path

if TYPE_CHECKING:
    from casfs.crypto.trust_root import TrustRoot
    from casfs.format.generation import Generation


class Replacement(NamedTuple):
    """A replacement of the repository's secret, as it is printed.

    `key` is the signing key of the machine that replaced it, and `hosts` those for which this machine trusts
    the key.
    """

    generation: int
    id: str
    key: str
    hosts: list[str]
    is_own: bool


def replacements(trust: TrustRoot, generations: Iterable[Generation]) -> list[Replacement]:
    """Return the replacements of the repository's secret, with what this machine knows of their machines."""
    from casfs.crypto.writers import TrustedWriters

    if not trust.config.signs_snapshots:
        return []
    writers = TrustedWriters(trust.config)
    return [
        Replacement(
            one.number, one.domain, one.key, writers.hosts_of(one.key), writers.is_own(one.key)
        )
        for one in generations
    ]


def machine_of(replacement: Replacement) -> str:
    """Return the machine that replaced the secret, as text."""
    if replacement.is_own:
        return f"this machine ({replacement.key})"
    hosts = ", ".join(escape_path(host.encode()) for host in replacement.hosts)
    return f"{hosts or 'a machine that signed no known snapshot'} ({replacement.key})"


def print_replacement(output: Output, replaced: Sequence[Replacement]) -> None:
    """Print how a removal replaced the repository's secret, or that it did not."""
    for one in replaced:
        output.line(
            f"replaced the repository's secret (number {one.generation}): run `casfs key accept` with an "
            "identity on every other machine that writes"
        )
        output.emit("secret", change="replaced", **one._asdict())
    if not replaced:
        output.line(
            "the repository has format 1, whose secret stays: a former recipient recognizes known content "
            "and can publish proven snapshots; `casfs upgrade` before the next removal ends this"
        )
