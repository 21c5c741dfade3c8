"""Checkpoints: written while training goes on, read on any ranks."""
