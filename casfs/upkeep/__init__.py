"""Keeping a repository well: check, repair, forget and prune."""
