"""A repository: configuration, blobs and snapshots, opened for reading or for writing."""
