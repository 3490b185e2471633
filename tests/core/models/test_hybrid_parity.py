"""Logits and greedy tokens of random hybrid models equal those of transformers, in float32."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.fixtures.tiny_models import save_tiny, tiny_transformers_model

from mortise import LLM, EngineConfig, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

NEXT, MOE_TEXT = "qwen3_next", "qwen3_5_moe_text"
TOLERANCE = 1e-4
NUM_TOKENS = 140
"""More than two chunks of the delta rule."""
NEW_TOKENS = 20
PROMPT_LENS = (70, 1, 23)
CHUNK = 17

DELTA_THEN_ATTENTION = ["linear_attention", "full_attention"]
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "partial_rotary_factor": 0.5,
}
SIZES: dict[str, dict[str, Any]] = {
    "two value heads a key head": {},
    "as many value heads as key heads, one in four layers attends": {
        "layer_types": None,
        "linear_num_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "num_key_value_heads": 1,
    },
    "three value heads a key head, biases": {
        "num_hidden_layers": 2,
        "layer_types": DELTA_THEN_ATTENTION,
        "linear_num_value_heads": 6,
        "attention_bias": True,
        "num_key_value_heads": 4,
    },
    "four value heads a key head, tied": {
        "num_hidden_layers": 3,
        "layer_types": [*DELTA_THEN_ATTENTION, "linear_attention"],
        "linear_num_value_heads": 8,
        "tie_word_embeddings": True,
        "num_experts_per_tok": 4,
    },
    "eight value heads of one key head, short convolution": {
        "num_hidden_layers": 2,
        "layer_types": DELTA_THEN_ATTENTION,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 8,
        "linear_conv_kernel_dim": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 20,
    },
    "yarn, all of a head's pairs but some": {
        "num_hidden_layers": 2,
        "layer_types": DELTA_THEN_ATTENTION,
        "rope_parameters": YARN,
    },
    "attention last, large epsilon": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", *DELTA_THEN_ATTENTION],
        "rms_norm_eps": 1e-3,
        "seed": 1,
    },
    "attention alone": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    f"{model_type}, {name}": {"model_type": model_type, **fields}
    for model_type in (NEXT, MOE_TEXT)
    for name, fields in SIZES.items()
} | {
    "qwen3_next, weights not normalised": {"model_type": NEXT, "norm_topk_prob": False},
    "qwen3_next, dense layers by step and by list": {
        "model_type": NEXT,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "intermediate_size": 56,
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(params=CONFIGURATIONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def theirs(name: str) -> torch.nn.Module:
    return tiny_transformers_model(**CONFIGURATIONS[name])


@cache
def saved(name: str, root: Path) -> Path:
    path = root / str(list(CONFIGURATIONS).index(name))
    return save_tiny(path, tokenizer=False, **CONFIGURATIONS[name])


@cache
def ours(name: str, root: Path, chunk: int = 512) -> LLM:
    return LLM(
        EngineConfig(
            model=str(saved(name, root)),
            dtype="float32",
            cache={"max_num_tokens": 512},
            scheduler={"max_num_batched_tokens": chunk},
        )
    )


@cache
def tokens_of(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


@cache
@torch.inference_mode()
def their_logits(name: str) -> torch.Tensor:
    return theirs(name)(tokens_of(NUM_TOKENS).unsqueeze(0)).logits[0]


@cache
@torch.inference_mode()
def their_greedy_tokens(name: str) -> list[list[int]]:
    """What transformers generates after each prompt alone."""
    return [
        theirs(name)
        .generate(prompt.unsqueeze(0), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :]
        .tolist()
        for prompt in prompts()
    ]


def prompts() -> list[torch.Tensor]:
    return [tokens_of(length, seed=length) for length in PROMPT_LENS]


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert got.dtype == torch.float32
    difference = float((got - expected).abs().max())
    assert difference < TOLERANCE, f"logits differ by {difference}"


def test_every_head_ratio_is_there() -> None:
    ratios = {
        fields.get("linear_num_value_heads", 4) // fields.get("linear_num_key_heads", 2)
        for fields in SIZES.values()
    }
    assert ratios == {1, 2, 3, 4, 8}


def test_logits_are_large_enough_to_differ(name: str) -> None:
    logits = their_logits(name)
    assert logits.abs().max() > 1.0
    # They depend on the position, not on the biases of the last layer alone.
    assert logits.std(dim=0).mean() > 0.2


def test_no_expert_is_chosen_by_a_hair(name: str) -> None:
    """Rounding would choose another one here than there; then the model needs another seed."""
    with torch.inference_mode():
        outputs = theirs(name)(tokens_of(NUM_TOKENS).unsqueeze(0), output_router_logits=True)
    chosen = theirs(name).config.num_experts_per_tok
    for logits in outputs.router_logits:
        best = logits.softmax(dim=-1).sort(dim=-1, descending=True).values
        assert (best[:, chosen - 1] - best[:, chosen]).min() > 1e-5


def test_logits(name: str, root: Path) -> None:
    assert_close(ours(name, root).logits(tokens_of(NUM_TOKENS).tolist()), their_logits(name))


def test_logits_in_chunks(name: str, root: Path) -> None:
    llm = ours(name, root, CHUNK)
    assert_close(llm.logits(tokens_of(NUM_TOKENS).tolist()), their_logits(name))


@pytest.mark.parametrize("chunk", [512, CHUNK])
def test_greedy_tokens_of_a_ragged_batch(name: str, root: Path, chunk: int) -> None:
    """Together here, one by one there."""
    completions = ours(name, root, chunk).generate(
        [prompt.tolist() for prompt in prompts()],
        SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True),
    )
    assert [list(completion.token_ids) for completion in completions] == their_greedy_tokens(name)


@pytest.mark.parametrize(
    "name", [f"{model_type}, two value heads a key head" for model_type in (NEXT, MOE_TEXT)]
)
def test_the_first_token_reaches_the_last_logits(name: str) -> None:
    """Otherwise a state that is lost on the way would not be noticed."""
    tokens = tokens_of(NUM_TOKENS).clone()
    tokens[0] = (tokens[0] + 1) % 256
    with torch.inference_mode():
        changed = theirs(name)(tokens.unsqueeze(0)).logits[0]
    assert (changed[-1] - their_logits(name)[-1]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    "name", [f"{model_type}, two value heads a key head" for model_type in (NEXT, MOE_TEXT)]
)
def test_bfloat16_loses_no_more_than_transformers_bfloat16(name: str, root: Path) -> None:
    """Tokens cannot be compared there: any order of summation gives others."""
    config = EngineConfig(
        model=str(saved(name, root)), dtype="bfloat16", cache={"max_num_tokens": 192}
    )
    tokens = tokens_of(NUM_TOKENS)
    rounded = tiny_transformers_model(**CONFIGURATIONS[name]).to(torch.bfloat16)
    with torch.inference_mode():
        their_loss = rounded(tokens.unsqueeze(0)).logits[0].float() - their_logits(name)
    our_loss = LLM(config).logits(tokens.tolist()) - their_logits(name)
    assert 0 < our_loss.abs().mean() < 1.3 * their_loss.abs().mean()
