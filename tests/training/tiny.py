"""A recipe and a stream of tokens so small that a stage takes a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from training.recipe import Recipe, read_recipe

RECIPE = Path(__file__).parents[2] / "core" / "training" / "recipe.toml"

MODEL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "max_position_embeddings": 64,
}


def recipe() -> Recipe:
    """Return the published recipe with a tiny model, few steps and short sequences."""
    raw = read_recipe(RECIPE).model_dump()
    raw["model"] |= MODEL
    raw["model"]["rope_scaling"] |= {"original_max_position_embeddings": 16}
    raw["held_out_sequences"] = 2
    sizes = {"steps": 4, "sequences": 4, "sequences_per_pass": 2, "mtp_from_step": 2}
    for stage in raw["stages"]:
        stage |= {**sizes, "sequence_length": 16 if stage["kind"] == "dense" else 24}
        for rate in ("learning_rate", "indexer_learning_rate", "bias_update_rate"):
            stage[rate] |= {"warmup_steps": min(1, stage[rate]["warmup_steps"]), "decay_steps": 2}
    return Recipe.model_validate(raw)


def as_toml() -> str:
    """Return the tiny recipe as a file."""
    return tomli_w.dumps(recipe().model_dump())


def write_data(directory: Path) -> Path:
    """Write two streams of documents in which each token nearly tells the next."""
    generator = np.random.default_rng(0)
    for name, length in (("train", 4000), ("held_out", 400)):
        steps = generator.integers(1, 3, size=length)
        tokens = 2 + steps.cumsum() % 62
        tokens[::100], tokens[99::100] = 0, 1  # where documents begin and end
        tokens.astype(np.uint16).tofile(directory / f"{name}.bin")
    return directory
