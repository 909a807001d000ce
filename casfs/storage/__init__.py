"""Where a repository's objects are kept: one contract (`base`), and a module for each kind of place."""
