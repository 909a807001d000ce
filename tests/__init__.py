"""Tests: `unit` and `property` need nothing, `fault` and `e2e` need FUSE and a real system."""
