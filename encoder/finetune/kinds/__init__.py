"""What a task can ask: each kind is one box, from a row's cells to the words of its export."""
