"""Layers as mathematics: no ranks, no files."""
