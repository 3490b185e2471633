"""Tests that guard the architecture instead of behaviour."""
