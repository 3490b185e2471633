"""Products of grouped rows with the weights of local experts, one mode of the operator a module."""
