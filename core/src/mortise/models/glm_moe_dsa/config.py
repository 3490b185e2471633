"""What ``config.json`` says of a GLM-5 model with sparse attention, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PositiveInt, StringConstraints, model_validator

from mortise.errors import ModelConfigError
from mortise.models.deepseek_v32.config import LatentMoEConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

IndexerType = Literal["full", "shared"]
MLPType = Literal["dense", "sparse"]


class GlmMoeDsaConfig(LatentMoEConfig):
    """The fields of ``GlmMoeDsaConfig`` in transformers 5.23, and what it makes of them.

    A ``full`` layer runs its own indexer; a ``shared`` one has none and attends to the keys that
    the nearest full layer before it picked. The published ``head_dim`` is not read:
    ``qk_rope_head_dim`` says what is rotated.
    """

    model_type: Literal["glm_moe_dsa"]
    rms_norm_eps: float = Field(default=1e-5, ge=0)
    eos_token_id: int | tuple[int, ...] | None = 1

    first_k_dense_replace: int = Field(default=3, ge=0)
    mlp_layer_types: tuple[MLPType, ...] | None = None
    routed_scaling_factor: float = 2.5
    mlp_bias: Literal[False] = False

    q_lora_rank: PositiveInt
    rope_interleave: Literal[True] = True

    index_n_heads: PositiveInt
    index_head_dim: PositiveInt
    index_topk: PositiveInt
    indexer_rope_interleave: bool = True
    indexer_types: tuple[IndexerType, ...] | None = None
    index_topk_pattern: (
        Annotated[str, StringConstraints(pattern="^[FS]*$")] | tuple[IndexerType, ...] | None
    ) = None
    index_topk_freq: int = 1
    index_skip_topk_offset: int = 2

    @classmethod
    def fields_of(cls, raw: Mapping[str, object]) -> dict[str, object]:
        """See :meth:`~mortise.models.decoder_config.RoutedDecoderConfig.fields_of`."""
        names = ("n_routed_experts", "num_experts", "num_local_experts")
        given = {name: raw[name] for name in names if raw.get(name) is not None}
        counts = list(given.values())
        if any(count != counts[0] for count in counts[1:]):
            raise ModelConfigError(
                "config.json counts the experts in several ways",
                details=[f"{name}: {count!r}" for name, count in given.items()],
                expected="one number",
            )
        return {**raw, "n_routed_experts": counts[0]} if counts else dict(raw)

    @model_validator(mode="after")
    def _one_kind_a_layer(self) -> Self:
        kinds = (
            ("mlp_layer_types", self.mlp_layer_types),
            ("indexer_types", self._indexer_types()),
        )
        for name, given in kinds:
            if given is not None and len(given) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(given)} entries for {self.num_hidden_layers} layers"
                )
        if 0 in self.sharing_layers:
            raise ValueError("the first layer shares the keys of an earlier one: indexer_types")
        return self

    def _indexer_types(self) -> tuple[str, ...]:
        """``indexer_types``, or else the pattern, or else the schedule of frequency and offset."""
        if self.indexer_types is not None:
            return self.indexer_types
        if isinstance(self.index_topk_pattern, str):
            return tuple({"F": "full", "S": "shared"}[one] for one in self.index_topk_pattern)
        if self.index_topk_pattern is not None:
            return self.index_topk_pattern
        every, offset = max(self.index_topk_freq, 1), self.index_skip_topk_offset
        return tuple(
            "shared" if max(layer - offset + 1, 0) % every else "full"
            for layer in range(self.num_hidden_layers)
        )

    @property
    def sharing_layers(self) -> frozenset[int]:
        """The ``shared`` layers."""
        kinds = enumerate(self._indexer_types())
        return frozenset(layer for layer, kind in kinds if kind == "shared")

    def is_dense(self, layer: int) -> bool:
        """See :meth:`~mortise.models.decoder_config.RoutedDecoderConfig.is_dense`."""
        if self.mlp_layer_types is None:
            return super().is_dense(layer)
        return layer < self.num_hidden_layers and self.mlp_layer_types[layer] == "dense"
