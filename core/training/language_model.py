"""The model under training: Mortise's own modules, made for one stage and freshly initialised.

Shape suffixes: B sequences, S tokens of a sequence, T = B * S, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mortise.layers.context import LayerContext
from mortise.layers.mla import LightningIndexer
from mortise.layers.moe import MoELayer
from mortise.layers.norm import RMSNorm
from mortise.layers.router import GroupedSigmoidRouter
from mortise.models.deepseek_v32.config import DeepseekV32Config
from mortise.models.deepseek_v32.model import DeepseekV32ForCausalLM, decoder_layer
from mortise.models.nextn import NextN
from training.experts import training_ops
from training.losses import linear_cross_entropy
from training.norm import rms_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mortise.layers.mla import Attend
    from mortise.spec.dispatch import Routing


@dataclass(frozen=True, slots=True)
class Losses:
    """Mean losses in nats: of the next token, and of the one after it where the MTP layer ran."""

    next_token: Tensor
    mtp: Tensor | None


class LanguageModel(nn.Module):
    """The main model and its MTP layer.

    Args:
        raw_config: contents of config.json.
        has_indexer: whether the model has its indexers and YaRN, or is DeepSeek-V3's dense form
            with the plain rotary embedding.
        compute_dtype: dtype of the experts' products.
    """

    def __init__(
        self, raw_config: Mapping[str, Any], *, has_indexer: bool, compute_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config = DeepseekV32Config.from_dict(stage_config(raw_config, has_indexer))
        context = LayerContext(ops=training_ops(compute_dtype))
        self.main = DeepseekV32ForCausalLM(self.config, context)
        last = self.config.num_hidden_layers
        self.mtp = NextN(
            self.config, context, decoder_layer(self.config, last, context, place=last)
        )
        for module in self.modules():
            if isinstance(module, MoELayer):
                module.finish_loading(torch.float32)
            if isinstance(module, GroupedSigmoidRouter):
                in_float32(module)
            if isinstance(module, RMSNorm):
                module.forward = partial(  # type: ignore[method-assign]
                    rms_norm, weight_H=module.weight, eps=module.eps
                )
            if isinstance(module, LightningIndexer):
                module.register_forward_pre_hook(_detached)

    def forward(self, windows: Tensor, attend: Attend, *, with_mtp: bool) -> Losses:
        """Return the losses over windows of token ids [B, S + 2]."""
        inputs_BS = windows[:, :-2]
        positions_T = torch.arange(inputs_BS.shape[1]).repeat(len(windows))
        rotation = self.main.rotary(positions_T)
        hidden_TH = self.main.model(inputs_BS.flatten(), rotation, attend)
        embedding = self.main.model.embed_tokens
        next_T = windows[:, 1:-1].flatten()
        loss = linear_cross_entropy(hidden_TH, embedding.weight, next_T)
        if not with_mtp:
            return Losses(loss, None)
        further_TH = self.mtp(embedding(next_T), hidden_TH, rotation, attend)
        second_T = windows[:, 2:].flatten()
        return Losses(loss, linear_cross_entropy(further_TH, embedding.weight, second_T))

    def routers(self) -> dict[str, GroupedSigmoidRouter]:
        """Return the routers by the names of their modules."""
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, GroupedSigmoidRouter)
        }


def stage_config(raw_config: Mapping[str, Any], has_indexer: bool) -> dict[str, Any]:
    """Return the configuration as published, or its dense form without YaRN."""
    if has_indexer:
        return dict(raw_config)
    return {**raw_config, "model_type": "deepseek_v3", "rope_scaling": None}


def in_float32(module: nn.Module) -> None:
    """Keep automatic mixed precision away from a module that is defined in float32."""
    forward: Callable[[Tensor], Routing] = module.forward
    module.forward = torch.autocast("cpu", enabled=False)(forward)


def _detached(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cut the indexer's inputs from the graph: its loss trains it alone."""
    return tuple(item.detach() if isinstance(item, Tensor) else item for item in inputs)


@torch.no_grad()
def initialise(model: nn.Module, seed: int, embedding_std: float, num_layers: int) -> None:
    """Fill every parameter: matrices by their fan-in, outputs to the residual stream smaller.

    Embedding and router gates get `embedding_std`, norms one, biases zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        elif "embed_tokens" in name or name.endswith("gate.weight"):
            parameter.normal_(0.0, embedding_std, generator=generator)
        else:
            is_output = name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight"))
            depth = (2 * num_layers) ** -0.5 if is_output else 1.0
            std = depth * parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, std, generator=generator)
