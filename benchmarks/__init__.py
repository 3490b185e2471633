"""Measurements, each with the machine and the date; never part of the tests."""
