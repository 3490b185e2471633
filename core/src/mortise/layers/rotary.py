"""Rotary position embedding, plain and stretched by YaRN."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """How YaRN stretches the context (arXiv 2309.00071).

    Fields are called as in ``rope_scaling`` of ``config.json``.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def rotary_scale(self) -> float:
        """Factor on cosine and sine."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(
                self.factor, self.mscale_all_dim
            )
        return yarn_mscale(self.factor, 1.0)

    @property
    def softmax_scale(self) -> float:
        """Factor on the softmax scale of attention (DeepSeek-V3's ``mscale_all_dim`` squared)."""
        return yarn_mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


def yarn_mscale(factor: float, mscale: float) -> float:
    """``0.1 * mscale * ln(factor) + 1``, and 1 where nothing is stretched."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def inverse_frequencies(dim: int, theta: float, yarn: YarnScaling | None) -> torch.Tensor:
    """float32 ``[dim / 2]``: radians per position of each rotated pair."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequencies = 1.0 / theta**exponents
    if yarn is None:
        return frequencies
    low, high = _correction_range(dim, theta, yarn)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(
        0, 1
    )
    return frequencies / yarn.factor * ramp + frequencies * (1 - ramp)


def _correction_range(dim: int, theta: float, yarn: YarnScaling) -> tuple[float, float]:
    """Between these pairs the frequencies go over from kept to stretched."""

    def pair_of(rotations: float) -> float:
        wavelengths = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(wavelengths) / (2 * math.log(theta))

    low, high = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotation of each token's pairs, float32 ``[T, dim]``, in the order of the halves.

    ``cos`` holds every pair's cosine twice; ``sin`` holds minus the sines, then the sines.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def interleaved(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Rotate pairs ``(x0, x1), (x2, x3), ...``; the result keeps first halves before second.

        The output order (all first elements, then all second) is a fixed permutation of the pairs,
        the same for queries and keys, so their products are unchanged.
        """
        first, second = x_TD[..., 0::2], x_TD[..., 1::2]
        return self._rotate(torch.cat([first, second], dim=-1), second, first)

    def halves(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Rotate pairs ``(x_i, x_{i + dim/2})``."""
        first, second = x_TD.chunk(2, dim=-1)
        return self._rotate(x_TD, second, first)

    def _rotate(
        self, x_TD: torch.Tensor, second: torch.Tensor, first: torch.Tensor
    ) -> torch.Tensor:
        cos, sin = self.cos.to(x_TD.dtype), self.sin.to(x_TD.dtype)
        if x_TD.dim() == 3:  # [T, heads, dim]
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return x_TD * cos + torch.cat([second, first], dim=-1) * sin


class RotaryEmbedding:
    """A table of rotations for every position of the context.

    Args:
        dim: rotated dimensions of a head.
        theta: base of the wavelengths.
        max_positions: positions in the table.
        yarn: stretching, or None.
    """

    def __init__(
        self, dim: int, theta: float, max_positions: int, yarn: YarnScaling | None
    ) -> None:
        frequencies = inverse_frequencies(dim, theta, yarn)
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
        scale = yarn.rotary_scale if yarn else 1.0
        self._cos, self._sin = angles.cos() * scale, angles.sin() * scale

    def to(self, device: torch.device) -> None:
        """Move the table to a device."""
        self._cos, self._sin = self._cos.to(device), self._sin.to(device)

    def __call__(self, positions_T: torch.Tensor) -> Rotation:
        """The rotations of int64 positions ``[T]``."""
        cos, sin = self._cos.index_select(0, positions_T), self._sin.index_select(0, positions_T)
        return Rotation(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))
