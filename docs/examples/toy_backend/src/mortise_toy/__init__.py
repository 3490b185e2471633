"""A backend to copy from; importing this imports nothing else."""
