"""What must never come out otherwise: cut points, digests, encodings, and a repository of format 1."""

from __future__ import annotations
