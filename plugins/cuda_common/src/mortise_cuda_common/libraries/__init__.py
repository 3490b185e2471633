"""One adapter for each vendor library, the only place that imports it."""
