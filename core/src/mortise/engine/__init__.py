"""Turning requests into tokens: scheduling, running, sampling, and the Python face of it all."""
