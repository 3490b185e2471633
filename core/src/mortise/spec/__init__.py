"""The contract between the core and every backend: hooks, records, versions."""
