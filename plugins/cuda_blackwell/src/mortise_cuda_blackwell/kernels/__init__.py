"""Triton programs of NVFP4, each with the plan of its launch."""
