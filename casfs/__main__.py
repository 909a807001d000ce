"""Run the command line as `python -m casfs`."""

from __future__ import annotations

from casfs.cli import main

if __name__ == "__main__":
    main()
