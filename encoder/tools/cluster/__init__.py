"""Runs on SLURM: what is submitted, and how it stands. The job scripts are in slurm/."""
