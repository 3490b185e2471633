"""Products of rows with one projection outside the experts, one operator a module."""
