"""Several processes that share the experts of one model."""
