"""What the NVIDIA backends do on a GPU, peers side by side in one run."""
