"""What a run was."""
