"""What a divergent answer looks like: cheap guesses at its cause, made only where they fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_FITS = 0.02
"""Error that a guess leaves of the recorded answer."""


def guess(recorded: torch.Tensor, replayed: torch.Tensor) -> str:
    """The first guess that fits, or nothing.

    Args:
        recorded: ``[R, ...]``, the right answer.
        replayed: of the same shape.
    """
    if not recorded.numel():
        return ""
    right, found = (one.detach().cpu().double().flatten(1) for one in (recorded, replayed))
    return _not_finite(right, found) or _one_end(right, found) or _factor(right, found)


def _not_finite(right: torch.Tensor, found: torch.Tensor) -> str:
    rows = (~found.isfinite() & right.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if not rows:
        return ""
    return f"{_rows_text(rows)} not finite, as if padding or a row past the last group was read"


def _one_end(right: torch.Tensor, found: torch.Tensor) -> str:
    """Some rows are zeros, and all others right."""
    zero = (found == 0).all(dim=1) & (right != 0).any(dim=1)
    if not bool(zero.any()) or _error(right[~zero], found[~zero]) > _FITS:
        return ""
    rows = zero.nonzero().flatten().tolist()
    is_end = rows[0] > 0 and rows == list(range(rows[0], len(right)))
    return f"{_rows_text(rows)} zeros" + (", as if the last were never computed" if is_end else "")


def _factor(right: torch.Tensor, found: torch.Tensor) -> str:
    """Everything is a multiple of what it should be."""
    power = float(right.square().sum())
    if power == 0.0:
        return ""
    factor = float((right * found).sum()) / power
    if abs(factor) < _FITS or _error(right * factor, found) > _FITS:
        return ""
    return f"all of it is the right answer times {factor:.4g}, as if a scale was wrong"


def _error(right: torch.Tensor, found: torch.Tensor) -> float:
    size = float(right.norm())
    return float((found - right).norm()) / size if size else float(bool(found.any()))


def _rows_text(rows: list[int]) -> str:
    if len(rows) == 1:
        return f"row {rows[0]} is"
    shown = ", ".join(map(str, rows[:4])) + (", ..." if len(rows) > 4 else "")
    return f"rows {shown} are"
