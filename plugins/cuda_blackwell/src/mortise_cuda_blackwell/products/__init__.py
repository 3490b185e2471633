"""What NVFP4 weights are multiplied by."""
