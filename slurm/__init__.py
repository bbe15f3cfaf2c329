"""SLURM batch scripts and their submission (no torch here)."""
