"""Checking, repairing, forgetting and pruning."""
