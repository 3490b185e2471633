"""GLM-5, whose layers may share the choice of another layer's indexer."""
