"""Directories and content lists of a snapshot, read and written."""
