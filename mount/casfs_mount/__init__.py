"""Showing snapshots as a file system: from a synchronous view of them to FUSE.

Arrows run one way: server → handlers → views → numbers, pieces and chunks → casfs. Only `handlers` and
`server` know FUSE and trio; everything below them can be used, and tested, without either.
"""
