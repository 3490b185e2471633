"""One projection of all local experts, in each scheme of its weights."""
