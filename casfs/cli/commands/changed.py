"""The command changed: list the files that changed while they were captured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casfs.cli.options import (
    as_of_option,
    common_options,
    complete_snapshots,
    snapshot_filter_options,
)
from casfs.cli.output import path_argument
from casfs.cli.settings import Settings
from casfs.cli.verbs import Verb
from casfs.digest import short_id
from casfs.display import escape_path

if TYPE_CHECKING:
    from casfs.digest import SnapshotId
    from casfs.format.snapshot import Snapshot

    Found = tuple[SnapshotId, Snapshot]


@click.command(cls=Verb)
@click.argument("snap", metavar="SNAP[:PATH]", shell_complete=complete_snapshots)
@as_of_option
@snapshot_filter_options
@common_options
@click.pass_obj
def changed(settings: Settings, snap: str) -> None:
    """List the files that changed while they were captured.

    Each line shows the reason, the number of attempts, and two BLAKE3 digests, as b3sum computes them:
    that of the captured data, and that of the file when it was read again.
    """
    from casfs.cli.entry_format import NodeFields, format_reason
    from casfs.format.tree import captured_digest
    from casfs.repository.opening import OpenOptions, open_for_reading
    from casfs.trees.reader import flagged_files

    output = settings.output()
    count = 0
    with open_for_reading(settings.repository(), OpenOptions(unlock=settings.unlock)) as repository:
        snapshot_id, snapshot, path, node = repository.snapshots.resolve_path(
            snap, settings.snapshot_filter()
        )
        fields = NodeFields(snapshot).fields
        for below, file in flagged_files(repository.trees, node, path):
            count += 1
            if output.as_json:
                output.emit("changed", snapshot=snapshot_id.hex(), **fields(below, file))
                continue
            capture = file.extra.capture if file.extra is not None else None
            attempts = capture.attempts if capture is not None else 0
            observed = capture.observed if capture is not None else None
            output.line(
                f"{format_reason(file):<10}  {attempts} attempt{'' if attempts == 1 else 's':<1}  "
                f"captured {short_id(captured_digest(file) or b'')}  "
                f"observed {short_id(observed) if observed is not None else 'nothing':<12}  "
                f"{escape_path(below)}"
            )
    if not count and not output.as_json:
        output.warn(f"nothing in {escape_path(path_argument(snap))} changed while it was captured")
