"""Tests of the distributions as users install them."""
