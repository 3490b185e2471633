"""Tests of recordings, made of tiny models on the reference."""
