"""What looks at runs from outside."""
