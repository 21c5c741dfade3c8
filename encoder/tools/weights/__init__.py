"""Stored models: export, import, growth, averages."""
