"""What the layers of a model do once their weights are in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mortise.layers.linear import DequantizedLinear, QuantizedLinear
from mortise.layers.moe import MoELayer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mortise.spec.dispatch import DispatchDecision


def finish_loading(
    model: nn.Module, compute_dtype: torch.dtype
) -> dict[str, tuple[DispatchDecision, ...]]:
    """Let every layer decide and prepare, in the order of the model; again after weight updates.

    Args:
        model: filled.
        compute_dtype: dtype of the hidden state.

    Returns:
        What was decided for each layer of experts, one for each mode, by its dotted name.

    Raises:
        BackendUnusableError: the backend cannot serve a layer.
        ConfigError: the user asked for a dispatch format that a layer's experts cannot consume.
    """
    decisions = {}
    for module in model.modules():
        if isinstance(module, MoELayer):
            decisions[module.name] = module.finish_loading(compute_dtype)
        elif isinstance(module, DequantizedLinear | QuantizedLinear):
            module.finish_loading(compute_dtype)
    return decisions
