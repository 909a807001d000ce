"""Blobs by digest: packs in a storage, found through an index that can be rebuilt from them."""
