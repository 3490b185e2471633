"""Qwen3-Next, and the text model of Qwen3.5 MoE, which stores the same projections apart."""
