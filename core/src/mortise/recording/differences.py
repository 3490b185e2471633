"""How far one answer is from another: by size, by place, and by what all of it has in common."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of an answer ``[R, ...]`` from the recorded one.

    Args:
        whole: norm of the difference over the norm of what was recorded.
        row: the same of the row where it is largest; small rows are measured as if they were not.
        worst_row: which row that is.
        gain: by how much the answer is larger altogether: the factor that fits it best, less 1.
        gain_error: the standard error of that among the rows; infinite of too few rows to tell.
        max_abs: the largest difference of one element.
        worst: where that is.
        recorded, replayed: the two elements.
        ulps: by how many representable numbers of their dtype these are apart; None where the
            dtypes differ or are wider than 32 bits.
        numbers: elements that were compared.
    """

    whole: float
    row: float
    worst_row: int
    gain: float
    gain_error: float
    max_abs: float
    worst: tuple[int, ...]
    recorded: float
    replayed: float
    ulps: int | None
    numbers: int

    @property
    def is_none(self) -> bool:
        """Whether every element is the recorded one."""
        return self.max_abs == 0.0


NO_DIFFERENCE = Difference(
    whole=0.0,
    row=0.0,
    worst_row=0,
    gain=0.0,
    gain_error=0.0,
    max_abs=0.0,
    worst=(),
    recorded=0.0,
    replayed=0.0,
    ulps=0,
    numbers=0,
)
"""Of two tensors without an element."""

_SMALL_ROW = 0.1
"""Rows of less than this share of the usual size are measured against that share: what is left of
sums that cancel is all rounding."""

_SMALL_ROW_OF_SCORES = 1.0
"""Scores add heads of either sign, and rows of few keys cancel as a whole."""


_FEWEST_ROWS = 8.0
"""Rows of equal weight that tell a factor in common from errors that happen to agree."""


def difference(
    replayed: torch.Tensor, recorded: torch.Tensor, visible: torch.Tensor | None = None
) -> Difference:
    """Compare two tensors ``[R, ...]`` of one shape in float64.

    What is not finite is infinitely far from everything but its equal.

    Args:
        replayed: the other answer.
        recorded: what it is compared with.
        visible: bool of the same shape, the scores of the indexer that count; None counts all of
            any other answer.
    """
    assert replayed.shape == recorded.shape
    one, other = replayed.detach().cpu(), recorded.detach().cpu()
    if not one.numel():
        return NO_DIFFERENCE
    rows = one.shape[0]
    found, expected = (tensor.double().reshape(rows, -1) for tensor in (one, other))
    if visible is not None:
        hidden = ~visible.cpu().reshape(rows, -1)
        found, expected = (tensor.masked_fill(hidden, 0.0) for tensor in (found, expected))
    same = (found == expected) | (found.isnan() & expected.isnan())
    off = torch.where(same, 0.0, (found - expected).abs().nan_to_num(torch.inf, torch.inf))
    expected = expected.nan_to_num(0.0, 0.0, 0.0)
    sizes, offs = expected.norm(dim=1), off.norm(dim=1)
    errors = _ratio(offs, torch.maximum(sizes, _smallest_sizes(expected, visible)))
    gain, gain_error = _gain(found, expected)
    place = int(off.argmax())
    worst = tuple(int(index) for index in torch.unravel_index(torch.tensor(place), one.shape))
    return Difference(
        whole=float(_ratio(off.norm(), expected.norm())),
        row=float(errors.max()),
        worst_row=int(errors.argmax()),
        gain=gain,
        gain_error=gain_error,
        max_abs=float(off.max()),
        worst=worst,
        recorded=float(other[worst]),
        replayed=float(one[worst]),
        ulps=_ulps(one[worst], other[worst]),
        numbers=one.numel() if visible is None else int(visible.sum()),
    )


def _smallest_sizes(expected: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """What the rows are measured against if they are smaller, float64 ``[R]``."""
    if visible is None:
        usual = float(expected.norm()) / len(expected) ** 0.5
        return expected.new_full((len(expected),), _SMALL_ROW * usual)
    seen = visible.cpu().reshape(len(expected), -1).sum(dim=1).double()
    usual = float(expected.norm() / seen.sum().clamp(min=1).sqrt())
    return seen.sqrt() * (_SMALL_ROW_OF_SCORES * usual)


def _ratio(off: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """0 where nothing is off, infinite where only the recorded one is zero."""
    return torch.where(off == 0, 0.0, off / size.clamp(min=1e-300))


def common_gain(replayed: torch.Tensor, recorded: torch.Tensor) -> tuple[float, float]:
    """The factor that rows have in common, less 1, and its standard error among them.

    Rows that say the same count once: their errors are the same error. The factor is that of the
    least squares, sum(found * expected) / sum(expected^2), so that rows weigh as their squares.

    Args:
        replayed: rows ``[R, ...]``.
        recorded: the rows to compare with.

    Returns:
        Both 0 where nothing is recorded but zeros; the error is infinite where too few different
        rows carry the sums.
    """
    return _gain(*(one.detach().cpu().double().flatten(1) for one in (replayed, recorded)))


def _gain(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    if not bool(found.isfinite().all()):
        return 0.0, inf
    both = torch.cat([found, expected], dim=1).unique(dim=0)
    found, expected = both.chunk(2, dim=1)
    weights = expected.square().sum(dim=1)
    total = float(weights.sum())
    if total == 0.0:
        return 0.0, 0.0
    apart = (found * expected).sum(dim=1) - weights
    gain = float(apart.sum()) / total
    if total**2 / float(weights.square().sum()) < _FEWEST_ROWS:
        return gain, inf
    return gain, float((apart - gain * weights).norm()) / total


def _ulps(one: torch.Tensor, other: torch.Tensor) -> int | None:
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    if one.dtype is not other.dtype or one.dtype not in kinds:
        return None
    return abs(_ordered(one.view(kinds[one.dtype])) - _ordered(other.view(kinds[one.dtype])))


def _ordered(bits: torch.Tensor) -> int:
    """The place of a floating-point number among all of its dtype, zero at 0."""
    number = int(bits)
    lowest = -(1 << (8 * bits.element_size() - 1))
    return number if number >= 0 else lowest - number
