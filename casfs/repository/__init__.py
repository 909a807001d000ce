"""A repository: creating and opening it, its snapshots, and the blobs that they need."""
