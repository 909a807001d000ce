"""The entry point of the command `casfs`, and of `python -m casfs`.

The signals are handled before anything else is loaded: loading takes most of the time of a short command.
"""

from __future__ import annotations

from casfs import interruption

interruption.install()

from casfs.cli import main  # noqa: E402 - after the signals are handled

__all__ = ["main"]

if __name__ == "__main__":
    main()
