"""Fuzz all parsers, or those that are named, with Atheris."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.fuzz.engine import Folder, FoundError, run
from tests.fuzz.targets import TARGETS


def main() -> None:
    """Run what the arguments say; exit with 1 where an input breaks a rule."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="such as tree; default: all")
    parser.add_argument("--inputs", type=int, default=100_000, help="for all targets together")
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"), help="what was found")
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - TARGETS.keys()
    if unknown:
        parser.error(
            f"there is no target {', '.join(sorted(unknown))}; there are: {', '.join(TARGETS)}"
        )
    chosen = {name: TARGETS[name] for name in arguments.targets or TARGETS}
    try:
        run(chosen, arguments.inputs, Folder(arguments.folder.absolute()))
    except FoundError as error:
        sys.exit(str(error))


main()
