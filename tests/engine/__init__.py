"""Tests of the engine, most of them on a model whose next token is a function of every token before."""
