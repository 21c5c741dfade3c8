"""Architectures assembled from encoder.nn, and their bridges to Hugging Face."""
