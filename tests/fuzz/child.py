"""The process of one slice: `python -m tests.fuzz.child TARGET CORPUS [options of libFuzzer]`."""

from __future__ import annotations

import logging
import sys

import atheris

with atheris.instrument_imports(include=["casfs", "casfs_mount"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Fuzz one target; Atheris ends the process."""
    logging.disable(logging.CRITICAL)
    target = TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target.accepts)
    atheris.Fuzz()


main()
