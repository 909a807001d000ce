"""The benchmark over a distance: casfs beside restic, with a repository in an object storage."""
