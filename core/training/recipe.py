"""The recipe of a training run, read from TOML and checked."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


NO_RATE = LearningRate(peak=0, final=0, warmup_steps=0, decay_steps=0)


class Stage(_Strict):
    """One stage: what learns, from how long sequences, for how many steps.

    `kind`: "dense" trains everything but the indexers on dense attention with plain rotary
    embedding; "indexer" trains only the indexers, on dense attention with YaRN; "sparse" trains
    everything on the selected keys. A step sees `sequences` windows of `sequence_length` tokens,
    `sequences_per_pass` at a time. The MTP layer learns from step `mtp_from_step` on, with a loss
    of weight `mtp_weight`; 0 leaves it out. `bias_update_rate` is the step of the routers'
    correction bias towards an even load.
    """

    name: str
    kind: Literal["dense", "indexer", "sparse"]
    steps: Positive
    sequence_length: Positive
    sequences: Positive
    sequences_per_pass: Positive
    learning_rate: LearningRate = NO_RATE
    indexer_learning_rate: LearningRate = NO_RATE
    mtp_weight: Annotated[float, Field(ge=0)] = 0.0
    mtp_from_step: NotNegative = 0
    bias_update_rate: LearningRate = NO_RATE

    @model_validator(mode="after")
    def _whole_passes(self) -> Self:
        if self.sequences % self.sequences_per_pass:
            raise ValueError("sequences must be a multiple of sequences_per_pass")
        return self

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
    embedding_std: Annotated[float, Field(gt=0)]
    optimizer: OptimizerRecipe
    stages: tuple[Stage, ...]
    model: dict[str, Any]


def read_recipe(file: Path) -> Recipe:
    """Read and check a recipe; pydantic names what is wrong in it."""
    return Recipe.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
