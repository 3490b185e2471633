"""Where the results of the chip may lie: numbers and how far off they may be, in float64.

A ball holds what the definition of a scheme gives and everything that the documented roundings of
the chip's programs and of the reference can make of it; nothing in it is measured. It says two
things of each number: a radius that no sum of roundings can leave, and a spread, the root of the
sum of their squares, which rounding errors that know nothing of each other keep to on average. A
float8 value may fall to a neighbour only where what it was made of reaches the edge between two.

R rows, K columns, N output rows of a weight, C groups of 128 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tests.fixtures import scheme_definitions as definitions

from mortise.plugin import ScaleFormat, StoredWeight, WeightScheme

Array = np.ndarray

BF16 = 2.0**-8
"""Largest relative error of one rounding to bfloat16; the other likewise."""
FP32 = 2.0**-24
STEEPEST_SILU = 1.1
USUAL = 3.0
"""Spreads that a sum of roundings rarely leaves."""
GROUP = 128
LARGEST = 448.0


@dataclass(frozen=True)
class Ball:
    """Numbers near ``center``, element by element."""

    center: Array
    radius: Array
    spread: Array

    @classmethod
    def exactly(cls, numbers: torch.Tensor | Array) -> Ball:
        center = np.asarray(
            numbers.double().numpy() if isinstance(numbers, torch.Tensor) else numbers
        )
        return cls(center, np.zeros_like(center), np.zeros_like(center))

    def wider(self, error: Array | float) -> Ball:
        """One more error of at most that much."""
        return Ball(self.center, self.radius + error, np.hypot(self.spread, error))

    def rounded(self, error: float) -> Ball:
        """One more rounding of a relative error."""
        radius = self.radius + error * (abs(self.center) + self.radius)
        return Ball(self.center, radius, np.hypot(self.spread, error * abs(self.center)))

    def misses(self, tensor: torch.Tensor) -> Array:
        """The elements of a result that lie outside; NaN does."""
        slack = 1e-9 + 1e-6 * self.radius
        return np.argwhere(~(abs(tensor.double().numpy() - self.center) <= self.radius + slack))

    def holds(self, tensor: torch.Tensor) -> bool:
        """No number outside, and on average none as far off as its spread."""
        off = tensor.double().numpy() - self.center
        return not len(self.misses(tensor)) and (off**2).mean() <= (self.spread**2).mean()


def arrived(values: torch.Tensor, scales: torch.Tensor) -> Ball:
    """Float8 rows that were quantised elsewhere are what they are."""
    wide = np.repeat(scales.double().numpy(), GROUP, axis=1)[:, : values.shape[1]]
    return Ball.exactly(values.double().numpy() * wide)


def quantised(rows: Ball, scale_format: ScaleFormat) -> Ball:
    """Rows in float8: by 128 columns, the largest magnitude over 448, ceiled where wanted."""
    radius = _reach(rows.center, rows.radius, scale_format)
    usual = np.minimum(rows.radius, USUAL * rows.spread)
    spread = _reach(rows.center, usual, scale_format)
    return Ball(_float8(rows.center, _scale(rows.center, scale_format)), radius, spread)


def product(rows: Ball, stored: StoredWeight) -> Ball:
    """Rows, as the weight takes them, times one expert's weight ``[N, K]``; not rounded."""
    weight_NK = definitions.weight(stored, torch.bfloat16)
    magnitudes = (abs(rows.center) + rows.radius) @ abs(weight_NK).T
    radius = rows.radius @ abs(weight_NK).T
    spread = np.sqrt(rows.spread**2 @ (weight_NK**2).T)
    sums = Ball(rows.center @ weight_NK.T, radius, spread)
    return sums.wider((weight_NK.shape[1] + 8) * FP32 * magnitudes)


def taken(rows: Ball, stored: StoredWeight) -> Ball:
    """Plain rows as a weight takes them."""
    return quantised(rows, stored.scale_format) if is_fp8(stored) else rows


def is_fp8(stored: StoredWeight) -> bool:
    return stored.scheme is WeightScheme.FP8_BLOCK


def swiglu(gate_up: Ball) -> Ball:
    """silu(gate) * up, rounded as often as bfloat16 tensors of torch are."""
    (gate, up), (gate_radius, up_radius), (gate_spread, up_spread) = (
        np.split(part, 2, axis=1) for part in (gate_up.center, gate_up.radius, gate_up.spread)
    )
    silu = gate / (1 + np.exp(-gate))
    radius = STEEPEST_SILU * gate_radius * (abs(up) + up_radius) + abs(silu) * up_radius
    spread = np.hypot(STEEPEST_SILU * gate_spread * up, silu * up_spread)
    return Ball(silu * up, radius, spread).rounded(3 * BF16)


def expert(rows: Ball, w13: StoredWeight, w2: StoredWeight) -> Ball:
    """Both products of one expert, for rows as the first takes them."""
    between = swiglu(product(rows, w13).rounded(BF16))
    return product(taken(between, w2), w2).rounded(BF16)


def _scale(center: Array, scale_format: ScaleFormat) -> Array:
    """``[R, C]``, in float32 as it is defined."""
    magnitudes = np.concatenate(
        [
            abs(part).max(axis=1, keepdims=True)
            for part in np.split(center, range(GROUP, center.shape[1], GROUP), axis=1)
        ],
        axis=1,
    )
    scale = np.maximum(magnitudes.astype(np.float32), np.float32(1e-10)) / np.float32(LARGEST)
    if scale_format is ScaleFormat.UE8M0:
        mantissa, exponent = np.frexp(scale)
        scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
    return scale.astype(np.float64)


def _float8(numbers: Array, scale: Array) -> Array:
    wide = np.repeat(scale, GROUP, axis=1)[:, : numbers.shape[1]]
    return _e4m3(numbers / wide) * wide


def _e4m3(numbers: Array) -> Array:
    clipped = torch.from_numpy(np.clip(numbers, -LARGEST, LARGEST)).float()
    return clipped.to(torch.float8_e4m3fn).double().numpy()


def _reach(center: Array, radius: Array, scale_format: ScaleFormat) -> Array:
    """How far a float8 number may be from that of the center."""
    own = _float8(center, _scale(center, scale_format))
    furthest = np.zeros_like(center)
    smaller = np.maximum(abs(center) - radius, 0)
    for amax in (smaller, abs(center) + radius):
        scale = _scale(amax, scale_format)
        for factor in (1 - 4 * FP32, 1.0, 1 + 4 * FP32):
            # A power of two is exact, once it is known which.
            near = scale if scale_format is ScaleFormat.UE8M0 else scale * factor
            for number in (center - radius, center, center + radius):
                furthest = np.maximum(furthest, abs(_float8(number, near) - own))
    if scale_format is ScaleFormat.FLOAT32:
        return furthest
    return np.maximum(furthest, 4 * FP32 * abs(own))
