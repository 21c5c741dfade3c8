"""Clean tokens to masked rows; a model's outputs to a loss."""
