"""A backend to copy from."""
