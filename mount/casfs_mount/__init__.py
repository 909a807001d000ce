"""The FUSE mount of casfs: a synchronous view of snapshots, and the request handlers above it.

Imports point one way: server → handlers → views → inode numbers, tree cache and chunk cache → casfs. Only
`handlers` and `server` import pyfuse3 and trio; everything below them works, and is tested, without FUSE.
"""
