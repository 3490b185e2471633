"""Help for tests, of Mortise and of anything that builds on it."""
