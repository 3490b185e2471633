"""The recipe of a training run, read from TOML and checked."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from pathlib import Path

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LearningRate(_Strict):
    """Linear warm-up to `peak`, constant, then linear decay to `final` over the last steps."""

    peak: Annotated[float, Field(ge=0)]
    final: Annotated[float, Field(ge=0)]
    warmup_steps: NotNegative
    decay_steps: NotNegative

    def at(self, step: int, steps: int) -> float:
        """Return the rate of step number `step` (from 0) of a stage of `steps` steps."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        decayed = step + 1 - (steps - self.decay_steps)
        if decayed <= 0:
            return self.peak
        return self.peak + (self.final - self.peak) * decayed / self.decay_steps


class Stage(_Strict):
    """One stage: what learns, from how long sequences, for how many steps.

    `kind`: "dense" trains everything but the indexers on dense attention with plain rotary
    embedding; "indexer" trains only the indexers, on dense attention with YaRN; "sparse" trains
    everything on the selected keys. A step sees `sequences` windows of `sequence_length` tokens,
    `sequences_per_pass` at a time. The MTP layer learns from step `mtp_from_step` on, with a loss
    of weight `mtp_weight`; 0 leaves it out.
    """

    name: str
    kind: Literal["dense", "indexer", "sparse"]
    steps: Positive
    sequence_length: Positive
    sequences: Positive
    sequences_per_pass: Positive
    learning_rate: LearningRate = LearningRate(peak=0, final=0, warmup_steps=0, decay_steps=0)
    indexer_learning_rate: LearningRate = LearningRate(
        peak=0, final=0, warmup_steps=0, decay_steps=0
    )
    mtp_weight: Annotated[float, Field(ge=0)] = 0.0
    mtp_from_step: NotNegative = 0

    def mtp_weight_at(self, step: int) -> float:
        """Return the weight of the MTP loss in step number `step`."""
        return self.mtp_weight if step >= self.mtp_from_step else 0.0


class OptimizerRecipe(_Strict):
    """Muon's momentum, AdamW's betas and epsilon, the decay and the clipping of both."""

    momentum: float
    weight_decay: float
    betas: tuple[float, float]
    epsilon: float
    clip_norm: Annotated[float, Field(gt=0)]


class Recipe(_Strict):
    """A whole run; `model` is the config.json to publish."""

    seed: NotNegative
    held_out_sequences: Positive
    checkpoint_seconds: Positive
    bias_update_rate: Annotated[float, Field(ge=0)]
    optimizer: OptimizerRecipe
    stages: tuple[Stage, ...]
    model: dict[str, Any]


def read_recipe(file: Path) -> Recipe:
    """Read and check a recipe; pydantic names what is wrong in it."""
    return Recipe.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
