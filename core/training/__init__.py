"""Training of the small model that the core ships; each module is run from `core/` by `-m`."""
