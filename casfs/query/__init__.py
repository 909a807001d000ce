"""Questions about snapshots that change nothing."""
