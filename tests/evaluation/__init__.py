"""Tests of measuring models on texts."""
