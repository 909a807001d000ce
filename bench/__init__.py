"""Measure casfs beside other backup programs and beside the limits of the machine.

Data flows one way: ``corpus`` makes trees of files, ``peers`` defines how each program is called,
``schedule`` runs them in turns through ``trial`` and ``measure``, ``records`` keeps every single
measurement, ``aims`` judges them, ``report`` and ``chart`` show them. casfs is measured as a user calls
it, like every other program; only the trivial file system of ``probes`` borrows its event library.
"""

from __future__ import annotations

from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
