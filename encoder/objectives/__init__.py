"""Clean tokens to a question; answers to a loss."""
