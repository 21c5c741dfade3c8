"""What a run will be."""
