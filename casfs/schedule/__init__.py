"""Schedules: systemd or cron runs a profile at given times."""

from __future__ import annotations
