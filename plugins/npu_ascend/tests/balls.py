"""Where the results of a device may lie: numbers and how far off they may be, in float64.

A ball holds what the definition of a scheme gives and everything that the documented roundings of
the device and of the reference can make of it; nothing in it is measured. It says two things of
each number: a radius that no sum of roundings can leave, and a spread, the root of the sum of their
squares, which rounding errors that know nothing of each other keep to on average. A quantised value
may fall to the next integer only where what it was made of reaches the edge between two.

R rows, K columns, N output rows of a weight, G groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tests.fixtures import scheme_definitions as definitions

from mortise.plugin import StoredWeight, WeightScheme
from mortise_npu_ascend.dispatch import Generation

Array = np.ndarray

BF16 = 2.0**-8
"""Largest relative error of one rounding to bfloat16; the others likewise."""
FP16 = 2.0**-11
FP32 = 2.0**-24
TRUNCATED = 2.0**-10
"""What the matrix unit drops of a scale, of which it uses 19 bits (a strict chip)."""
SMALLEST_FP16 = 2.0**-25
STEEPEST_SILU = 1.1
USUAL = 3.0
"""Spreads that a sum of roundings rarely leaves."""

LARGEST = {WeightScheme.W8A8: 127, WeightScheme.W4A8: 127, WeightScheme.W4A4: 7}


@dataclass(frozen=True)
class Chip:
    """Whose roundings are allowed."""

    generation: Generation
    strict: bool = False

    def __str__(self) -> str:
        return f"{self.generation}{'-strict' if self.strict else ''}"


@dataclass(frozen=True)
class Ball:
    """Numbers near ``center``, element by element."""

    center: Array
    radius: Array
    spread: Array

    @classmethod
    def exactly(cls, tensor: torch.Tensor) -> Ball:
        center = tensor.double().numpy()
        return cls(center, np.zeros_like(center), np.zeros_like(center))

    def wider(self, error: Array | float) -> Ball:
        """One more error of at most that much."""
        return Ball(self.center, self.radius + error, np.hypot(self.spread, error))

    def rounded(self, error: float) -> Ball:
        """One more rounding of a relative error."""
        radius = self.radius + error * (abs(self.center) + self.radius)
        return Ball(self.center, radius, np.hypot(self.spread, error * abs(self.center)))

    def misses(self, tensor: torch.Tensor) -> Array:
        """The elements of a result that lie outside."""
        slack = 1e-9 + 1e-6 * self.radius
        return np.argwhere(abs(tensor.double().numpy() - self.center) > self.radius + slack)


@dataclass(frozen=True)
class Integers:
    """Rows quantised one by one.

    Args:
        values: integers ``[R, K]``.
        steps: by how many integers each may differ.
        usual_steps: by how many it may unless errors conspire.
        scale: ``[R, 1]``.
        scale_error: relative, ``[R, 1]``.
    """

    values: Array
    steps: Array
    usual_steps: Array
    scale: Array
    scale_error: Array

    @classmethod
    def of(cls, rows: Ball, largest: int) -> Integers:
        """Quantise by amax over the largest integer, ties to even, in float32."""
        amax = abs(rows.center).max(axis=1, keepdims=True)
        amax = np.where(amax == 0, 1.0, amax)
        above = (abs(rows.center) + rows.radius).max(axis=1, keepdims=True)
        below = (abs(rows.center) - rows.radius).max(axis=1, keepdims=True)
        scale_error = np.maximum(above / amax - 1, 1 - below / amax) + 4 * FP32
        scaled = rows.center * largest / amax
        values = np.rint(scaled)
        to_the_edge = 0.5 - abs(scaled - values)

        def steps(radius: Array) -> Array:
            reach = radius * largest / amax + abs(scaled) * scale_error
            return np.where(reach >= to_the_edge, np.floor(reach - to_the_edge) + 1, 0)

        usual = np.minimum(rows.radius, USUAL * rows.spread)
        return cls(values, steps(rows.radius), steps(usual), amax / largest, scale_error)

    @classmethod
    def arrived(cls, values: torch.Tensor, scales: torch.Tensor) -> Integers:
        """Rows that were quantised elsewhere are what they are."""
        integers = values.double().numpy()
        scale = scales.double().numpy()[:, None]
        none = np.zeros_like(integers)
        return cls(integers, none, none, scale, np.zeros_like(scale))


def product(rows: Ball | Integers, stored: StoredWeight, chip: Chip) -> Ball:
    """Rows times one expert's weight ``[N, K]``, rounded to the dtype of the result."""
    scheme = stored.scheme
    if scheme is WeightScheme.FLOAT:
        assert isinstance(rows, Ball)
        half = BF16 if stored.weight.dtype is torch.bfloat16 else FP32
        return _float_product(rows, stored.weight.double().numpy()).rounded(half)
    if scheme is WeightScheme.W4A16:
        assert isinstance(rows, Ball)
        return _weight_only_product(rows, stored).rounded(BF16)
    if isinstance(rows, Ball):
        rows = Integers.of(rows, LARGEST[scheme])
    match scheme:
        case WeightScheme.W8A8:
            ball = _int8_product(rows, stored, chip)
        case WeightScheme.W4A8 if chip.generation is Generation.A5:
            ball = _made_int8_product(rows, stored)
        case WeightScheme.W4A8:
            ball = _assisted_product(rows, stored, chip)
        case WeightScheme.W4A4:
            ball = _int4_product(rows, stored, chip)
    return ball.rounded(BF16)


def swiglu(gate_up: Ball) -> Ball:
    """silu(gate) * up, rounded as often as bfloat16 tensors of torch are."""
    (gate, up), (gate_radius, up_radius), (gate_spread, up_spread) = (
        np.split(part, 2, axis=1) for part in (gate_up.center, gate_up.radius, gate_up.spread)
    )
    silu = gate / (1 + np.exp(-gate))
    radius = STEEPEST_SILU * gate_radius * (abs(up) + up_radius) + abs(silu) * up_radius
    spread = np.hypot(STEEPEST_SILU * gate_spread * up, silu * up_spread)
    return Ball(silu * up, radius, spread).rounded(3 * BF16)


def expert(rows: Ball | Integers, w13: StoredWeight, w2: StoredWeight, chip: Chip) -> Ball:
    """Both products of one expert."""
    return product(swiglu(product(rows, w13, chip)), w2, chip)


def _float_product(rows: Ball, weight_NK: Array) -> Ball:
    magnitudes = (abs(rows.center) + rows.radius) @ abs(weight_NK).T
    radius = rows.radius @ abs(weight_NK).T
    spread = np.sqrt(rows.spread**2 @ (weight_NK**2).T)
    sums = Ball(rows.center @ weight_NK.T, radius, spread)
    return sums.wider((weight_NK.shape[1] + 8) * FP32 * magnitudes)


def _weight_only_product(rows: Ball, stored: StoredWeight) -> Ball:
    """The device rounds the scale to bfloat16 and value times scale again; the reference once."""
    assert stored.scale is not None
    weight_NK = definitions.int4(stored)
    rounded = StoredWeight(
        scheme=stored.scheme,
        weight=stored.weight,
        scale=stored.scale.to(torch.bfloat16).float(),
    )
    ways = [_to_bfloat16(weight_NK), _to_bfloat16(definitions.int4(rounded))]
    off = [abs(rows.center @ (way - weight_NK).T) for way in ways]
    beside = rows.radius @ abs(ways[1] - weight_NK).T
    return _float_product(rows, weight_NK).wider(np.maximum(*off) + beside)


def _int8_product(rows: Integers, stored: StoredWeight, chip: Chip) -> Ball:
    """A2 and A3 multiply by scales in bfloat16, the A5 and the reference by the stored ones."""
    assert stored.scale is not None
    scale_1N = stored.scale.double().numpy().T
    rounded_1N = stored.scale.to(torch.bfloat16).double().numpy().T
    is_a5 = chip.generation is Generation.A5
    off_1N = np.zeros_like(scale_1N) if is_a5 else abs(rounded_1N / scale_1N - 1)
    return _sums(rows, stored.weight.double().numpy() * scale_1N.T, off_1N)


def _sums(rows: Integers, weight_NK: Array, scale_off: Array | float = 0.0) -> Ball:
    """Exact sums, scaled in float32."""
    sums = rows.values @ weight_NK.T
    moved = rows.steps @ abs(weight_NK).T
    usually_moved = np.sqrt(rows.usual_steps**2 @ (weight_NK**2).T)
    error = rows.scale_error + scale_off + 4 * FP32
    ball = Ball(sums, moved * (1 + error), usually_moved).wider(abs(sums) * error)
    return Ball(ball.center * rows.scale, ball.radius * rows.scale, ball.spread * rows.scale)


def _assisted_product(rows: Integers, stored: StoredWeight, chip: Chip) -> Ball:
    """Upper and lower halves of a row each sum in fp16, a group of columns after the other."""
    assert stored.scale is not None
    weight_NK = definitions.int4(stored)
    groups = stored.scale.shape[-1]
    of_operator = groups * -(-weight_NK.shape[1] // groups // 256) if groups > 1 else 1
    upper = np.floor(rows.values / 16)
    lower = rows.values - 16 * upper - 8
    moved = (rows.steps > 0).astype(np.float64) @ abs(weight_NK).T
    in_fp16 = 16 * (_group_sums(upper, weight_NK, groups) + moved)
    in_fp16 += _group_sums(lower, weight_NK, groups) + 15 * moved
    in_fp32 = in_fp16 + abs(8 * weight_NK.sum(axis=1))
    error = _fp16_error(in_fp16, of_operator, chip) + 4 * FP32 * in_fp32
    tiny = 17 * 2 * of_operator * SMALLEST_FP16
    return _sums(rows, weight_NK).wider((error + tiny) * rows.scale)


def _int4_product(rows: Integers, stored: StoredWeight, chip: Chip) -> Ball:
    assert stored.scale is not None
    weight_NK = definitions.int4(stored)
    groups = stored.scale.shape[-1]
    in_fp16 = _group_sums(rows.values, weight_NK, groups) + rows.steps @ abs(weight_NK).T
    error = _fp16_error(in_fp16, groups, chip) + 2 * groups * SMALLEST_FP16
    return _sums(rows, weight_NK).wider(error * rows.scale)


def _fp16_error(magnitudes: Array, groups: int, chip: Chip) -> Array:
    """Each group is rounded once, and each sum of groups."""
    return magnitudes * ((1 + groups) * FP16 + (TRUNCATED if chip.strict else 0.0))


def _group_sums(values: Array, weight_NK: Array, groups: int) -> Array:
    """The magnitudes of the groups' sums, added up."""
    parts = zip(np.split(values, groups, axis=1), np.split(weight_NK, groups, axis=1), strict=True)
    return np.sum([abs(part @ weight.T) for part, weight in parts], axis=0)


def _made_int8_product(rows: Integers, stored: StoredWeight) -> Ball:
    """Weights of several groups become integers of a 127th of their row's largest scale times 8."""
    assert stored.scale is not None
    ball = _sums(rows, definitions.int4(stored))
    if stored.scale.shape[-1] == 1:
        return ball
    unit = stored.scale.double().numpy().max(axis=1) * 8 / 127
    # Half an integer, and what fp16 rounds of the factor and of the product before.
    off = (0.5 + 2 * 127 * FP16) * unit
    magnitudes = (abs(rows.values) + rows.steps) * rows.scale
    radius = ball.radius + magnitudes.sum(axis=1, keepdims=True) * off
    usual = np.sqrt((magnitudes**2).sum(axis=1, keepdims=True)) * off
    return Ball(ball.center, radius, np.hypot(ball.spread, usual))


def _to_bfloat16(values: Array) -> Array:
    return torch.from_numpy(values).float().to(torch.bfloat16).double().numpy()
