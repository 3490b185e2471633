"""What the layers of a model are going to ask of a backend, once they are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.layers.gated_delta_net import GatedDeltaNet
from mortise.layers.linear import QuantizedLinear
from mortise.layers.moe import MoELayer

if TYPE_CHECKING:
    from torch import nn

    from mortise.spec.experts import ExpertWeights
    from mortise.spec.qkv import QKVShape
    from mortise.spec.weights import LinearWeight


def experts_in_use(model: nn.Module) -> tuple[ExpertWeights, ...]:
    """The prepared experts of every layer that has some, in the order of the model."""
    return tuple(module.weights for module in model.modules() if isinstance(module, MoELayer))


def linears_in_use(model: nn.Module) -> tuple[LinearWeight, ...]:
    """Every prepared projection outside the experts that is multiplied quantised."""
    return tuple(
        module.prepared for module in model.modules() if isinstance(module, QuantizedLinear)
    )


def qkv_shapes_in_use(model: nn.Module) -> tuple[QKVShape, ...]:
    """The different shapes of fused projections that are split."""
    shapes = (module.shape for module in model.modules() if isinstance(module, GatedDeltaNet))
    return tuple(dict.fromkeys(shapes))
