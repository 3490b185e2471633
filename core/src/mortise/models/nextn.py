"""The NextN layer, in which DeepSeek and GLM predict one token further than the model does."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from mortise.checkpoint.placement import Placement, Skip
from mortise.errors import ModelConfigError
from mortise.layers.finish import finish_loading
from mortise.layers.linear import linear, projection_placements
from mortise.layers.norm import RMSNorm
from mortise.models.decoder_weights import layer_placements, layer_skips
from mortise.models.shared_tensors import same_as_main
from mortise.spec.dispatch import DispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mortise.layers.context import LayerContext
    from mortise.layers.rotary import RotaryEmbedding, Rotation
    from mortise.models.decoder import Decoder, DecoderLayer
    from mortise.models.decoder_config import RoutedDecoderConfig
    from mortise.models.family import PagedPass
    from mortise.parallel.group import ExpertParallelGroup
    from mortise.spec.dispatch import DispatchDecision

Config = TypeVar("Config", bound="RoutedDecoderConfig")


class NextN(nn.Module):
    """One multi-token prediction module (arXiv 2412.19437 section 2.2).

    It reads the model's normalised hidden state at position i beside the embedding of token i + 1,
    and its normalised output, through the model's head, predicts token i + 2. Embedding and head
    are the main model's.

    Args:
        config: sizes; the layer follows the last of ``num_hidden_layers`` in the checkpoint.
        context: where the layer is built.
        layer: the decoder layer inside it.
    """

    def __init__(
        self, config: RoutedDecoderConfig, context: LayerContext, layer: DecoderLayer
    ) -> None:
        super().__init__()
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.name = nextn_name(config)
        self.schemes = context.schemes
        self.enorm = RMSNorm(hidden_size, eps)
        self.hnorm = RMSNorm(hidden_size, eps)
        self.eh_proj = linear(context, [f"{self.name}.eh_proj"], 2 * hidden_size, hidden_size)
        self.layer = layer
        self.norm = RMSNorm(hidden_size, eps)

    def forward(
        self,
        embeddings_TH: torch.Tensor,
        hidden_TH: torch.Tensor,
        rotation: Rotation,
        attend: Callable[..., torch.Tensor],
        mode: DispatchMode = DispatchMode.NORMAL,
    ) -> torch.Tensor:
        """Normalised hidden states ``[T, H]`` for the model's head.

        Args:
            embeddings_TH: of the token after each position.
            hidden_TH: normalised hidden states of each position.
            rotation: of each position.
            attend: how queries meet keys.
            mode: how the tokens travel to their experts.
        """
        joined = torch.cat([self.enorm(embeddings_TH), self.hnorm(hidden_TH)], dim=-1)
        output: torch.Tensor = self.norm(self.layer(self.eh_proj(joined), rotation, attend, mode))
        return output


class NextNDraft(nn.Module):
    """The layer as a model of the draft role; families add the cache that its attention needs.

    Parameters are created empty on the current torch device and dtype; fill them with
    :func:`draft_placements`, then call :meth:`finish_loading`.

    Args:
        config: the main model's configuration.
        context: hooks, stored schemes, and the other surroundings of this role.
        layer: a decoder layer whose place in the cache is the first.
        rotary: the rotations of its attention.
    """

    def __init__(
        self,
        config: RoutedDecoderConfig,
        context: LayerContext,
        layer: DecoderLayer,
        rotary: RotaryEmbedding,
    ) -> None:
        super().__init__()
        self.nextn = NextN(config, context, layer)
        self.rotary = rotary

    def finish_loading(self) -> dict[str, tuple[DispatchDecision, ...]]:
        """Let the layer decide and prepare; after loading and after weight updates."""
        norm = self.nextn.norm.weight
        self.rotary.to(norm.device)
        return finish_loading(self, norm.dtype)

    def run(
        self, embeddings_TH: torch.Tensor, hidden_TH: torch.Tensor, paged_pass: PagedPass
    ) -> torch.Tensor:
        """See :class:`~mortise.models.family.DraftModel`."""
        assert callable(paged_pass)
        rotation = self.rotary(paged_pass.positions)
        output: torch.Tensor = self.nextn(
            embeddings_TH, hidden_TH, rotation, paged_pass, paged_pass.dispatch_mode
        )
        return output


def nextn_name(config: RoutedDecoderConfig) -> str:
    """Dotted name of the layer in the checkpoint."""
    return f"model.layers.{config.num_hidden_layers}"


def require_nextn(config: Config) -> Config:
    """The configuration of a model that has the layer.

    Raises:
        ModelConfigError: it has none.
    """
    if not config.num_nextn_predict_layers:
        raise ModelConfigError(
            f"this {config.model_type} model has no multi-token prediction layer to draft with",
            details=["num_nextn_predict_layers of config.json is 0 or not there"],
            expected="num_nextn_predict_layers: 1",
            remedy="leave out draft.num_tokens (--draft), or name a directory that holds the"
            " layer in draft.model",
        )
    return config


def nextn_placements(nextn: NextN) -> Iterator[Placement]:
    """Every tensor of the layer, under the hub's names."""
    prefix = nextn.name
    yield Placement(f"{prefix}.enorm.weight", nextn.enorm.weight)
    yield Placement(f"{prefix}.hnorm.weight", nextn.hnorm.weight)
    yield from projection_placements(nextn.schemes, [f"{prefix}.eh_proj"], nextn.eh_proj)
    yield Placement(f"{prefix}.shared_head.norm.weight", nextn.norm.weight)
    yield from layer_placements(prefix, nextn.layer, nextn.schemes)


def draft_placements(
    draft: NextNDraft, decoder: Decoder, lm_head: nn.Linear | None
) -> Iterator[Placement]:
    """Every tensor of the layer, and copies of the main model's embedding and head, if stored.

    Args:
        draft: the layer to fill.
        decoder: the main model's, loaded.
        lm_head: the main model's, or None where its embedding is the head.
    """
    nextn = draft.nextn
    yield from nextn_placements(nextn)
    embedding = decoder.embed_tokens.weight
    head = embedding if lm_head is None else lm_head.weight
    yield same_as_main(f"{nextn.name}.embed_tokens.weight", embedding, "embedding")
    yield same_as_main(f"{nextn.name}.shared_head.head.weight", head, "head")


def draft_skips(config: RoutedDecoderConfig, group: ExpertParallelGroup) -> tuple[Skip, ...]:
    """Tensors that a checkpoint may hold and the draft on this rank does not need."""
    first, count = config.num_hidden_layers, config.num_nextn_predict_layers
    before = "|".join(map(str, range(first)))
    further = [
        Skip(rf"model\.layers\.{index}\..*", "only the first multi-token prediction layer drafts")
        for index in range(first + 1, first + count)
    ]
    return (
        Skip(r"(?!model\.layers\.\d).*", "the main model's"),
        Skip(rf"model\.layers\.(?:{before})\..*", "the main model's"),
        *further,
        *layer_skips(config, group),
    )
