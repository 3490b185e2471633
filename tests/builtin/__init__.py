"""Tests of the model that comes with Mortise, on the weights that are shipped."""
