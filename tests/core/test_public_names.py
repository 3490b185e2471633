"""The public names are there, and cost nothing before they are used."""

from __future__ import annotations

import importlib.metadata

import pytest

import mortise


def test_every_public_name_can_be_had() -> None:
    assert {name for name in mortise.__all__ if getattr(mortise, name) is not None} == set(
        mortise.__all__
    )
    assert set(dir(mortise)) == set(mortise.__all__)
    assert mortise.__version__ == importlib.metadata.version("mortise-core")


def test_any_other_name_is_missing() -> None:
    with pytest.raises(AttributeError, match="module 'mortise' has no attribute 'llm_engine'"):
        _ = mortise.llm_engine
