"""Exchanges of rows through DeepEP's buffers."""
