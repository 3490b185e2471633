"""Tests of the engine, on a tiny model and on one whose tokens can be told beforehand."""
