"""The product of rows with a stored weight, one scheme a module: what is rounded, and when."""
