"""Read-only queries about snapshots: diff, find, history, stats."""
