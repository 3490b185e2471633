"""Every operator that is emulated, with the function that computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

OPERATORS: Final[tuple[tuple[str, Callable[..., object]], ...]] = ()
"""Pairs of a name in ``schemas.py`` and the function; each module of operators has such a tuple."""
