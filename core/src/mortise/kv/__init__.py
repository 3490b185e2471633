"""The cache: who owns which page and which slot, and the tensors they live in."""
