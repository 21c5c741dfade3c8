"""What would go wrong."""
