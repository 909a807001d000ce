"""Schedules: profiles that run by themselves, under systemd or cron."""

from __future__ import annotations
