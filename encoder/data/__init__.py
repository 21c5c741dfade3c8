"""Shards to micro-batches, as a pure function of (run file, position)."""
