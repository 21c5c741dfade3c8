"""Verbs: what a person runs."""
