"""The NVIDIA Blackwell backend of Mortise."""
