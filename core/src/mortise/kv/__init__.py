"""The paged cache: who owns which page, and the tensors the pages live in."""
