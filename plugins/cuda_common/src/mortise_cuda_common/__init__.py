"""What the NVIDIA backends of Mortise share: kernels, adapters, and an emulation of the chips."""
