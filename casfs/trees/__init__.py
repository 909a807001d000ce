"""Readers and writers of directories and content lists."""
