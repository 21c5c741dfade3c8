"""What launch/bench.py measures, a module a question; results/ holds what was measured, with the commands."""
