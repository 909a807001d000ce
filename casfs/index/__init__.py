"""The index: an LMDB database that maps digests to locations in packs, derived from the packs."""
