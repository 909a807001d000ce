"""The index: which blob lies where, derived from the packs."""
