"""The NVIDIA Hopper backend of Mortise."""
