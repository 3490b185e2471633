"""Every hook call of a run on disk, and what another backend answers to the same calls."""
