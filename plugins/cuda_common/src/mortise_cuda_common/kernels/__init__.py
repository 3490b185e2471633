"""Triton programs and the plan of each launch."""
