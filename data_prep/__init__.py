"""Text to shards: the data-prep command."""
