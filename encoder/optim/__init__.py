"""Updates and schedules."""
