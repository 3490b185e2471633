"""Logits and greedy tokens of random models equal those of transformers, in float32."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.fixtures.paged_models import PagedModel, Request, scattered_pages
from tests.fixtures.tiny_models import YARN, save_tiny, tiny_transformers_model

from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from pathlib import Path

TOLERANCE = 1e-4
NUM_TOKENS = 80
NEW_TOKENS = 24

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "v32": {},
    "v32 more heads, no groups, three dense layers": {
        "num_attention_heads": 8,
        "v_head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 3,
        "index_topk": 24,
    },
    "v32 four groups, two kept, weights not normalised": {
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
    },
    "v32 yarn": {"rope_parameters": YARN, "index_topk": 8},
    "v32 yarn of two scales, tied embeddings": {
        "rope_parameters": YARN | {"mscale": 0.7, "factor": 8.0},
        "tie_word_embeddings": True,
        "n_shared_experts": 2,
    },
    "v32 biases, every key seen": {"attention_bias": True, "index_topk": 512},
    "v3": {"model_type": "deepseek_v3"},
    "v3 without a latent query": {"model_type": "deepseek_v3", "q_lora_rank": None},
    "v3 yarn, all layers of experts": {
        "model_type": "deepseek_v3",
        "rope_parameters": YARN | {"mscale_all_dim": 0.5},
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 0,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
    },
    "v3 halves rotated, biases, tied": {
        "model_type": "deepseek_v3",
        "rope_interleave": False,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "num_attention_heads": 2,
        "n_group": 1,
        "topk_group": 1,
    },
}
SPARSE = [
    name
    for name, fields in CONFIGURATIONS.items()
    if fields.get("model_type") != "deepseek_v3" and fields.get("index_topk", 16) < NUM_TOKENS
]


@cache
def theirs(name: str) -> torch.nn.Module:
    return tiny_transformers_model(**CONFIGURATIONS[name])


@cache
def saved(name: str, root: Path) -> Path:
    path = root / name.replace(" ", "_").replace(",", "")
    return save_tiny(path, tokenizer=False, **CONFIGURATIONS[name])


@cache
def loaded(name: str, root: Path) -> PagedModel:
    return PagedModel(saved(name, root))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(params=CONFIGURATIONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokens() -> torch.Tensor:
    return tokens_of(NUM_TOKENS)


def tokens_of(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def their_logits(name: str, tokens: torch.Tensor) -> torch.Tensor:
    return theirs(name)(tokens.unsqueeze(0)).logits[0]


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert got.dtype == torch.float32
    difference = float((got - expected).abs().max())
    assert difference < TOLERANCE, f"logits differ by {difference}"


def test_logits_are_large_enough_to_differ(name: str, tokens: torch.Tensor) -> None:
    logits = their_logits(name, tokens)
    assert logits.abs().max() > 1.0
    # The distribution depends on the position, not on the last layer's bias alone.
    assert logits.std(dim=0).mean() > 0.2


def test_logits_of_a_whole_sequence(name: str, root: Path, tokens: torch.Tensor) -> None:
    assert_close(loaded(name, root).full(tokens), their_logits(name, tokens))


def test_chunks_and_single_tokens_over_scattered_pages(
    name: str, root: Path, tokens: torch.Tensor
) -> None:
    model = loaded(name, root)
    model.poison()
    got = model.stepwise(tokens, [23, 1, 40], scattered_pages(NUM_TOKENS, first=2))
    assert_close(got, their_logits(name, tokens))


def test_greedy_tokens(name: str, root: Path) -> None:
    prompt = tokens_of(40, seed=2)
    with torch.inference_mode():
        expected = theirs(name).generate(
            prompt.unsqueeze(0), max_new_tokens=NEW_TOKENS, do_sample=False
        )[0, len(prompt) :]
    assert greedy(loaded(name, root), prompt) == expected.tolist()


def greedy(model: PagedModel, prompt: torch.Tensor) -> list[int]:
    pages = scattered_pages(len(prompt) + NEW_TOKENS)
    model.poison()
    logits = model.forward(ForwardMode.PREFILL, [Request(prompt, len(prompt), pages)])
    produced = [int(logits[-1].argmax())]
    while len(produced) < NEW_TOKENS:
        newest = torch.tensor(produced[-1:])
        context_len = len(prompt) + len(produced)
        logits = model.forward(ForwardMode.DECODE, [Request(newest, context_len, pages)])
        produced.append(int(logits[-1].argmax()))
    return produced


@pytest.mark.parametrize("name", SPARSE)
def test_sparsity_bites(name: str, root: Path, tokens: torch.Tensor) -> None:
    """Where the indexer drops keys, attention to all of them gives other logits."""
    model = loaded(name, root)
    topk = model.model.config.index_topk
    sparse = model.full(tokens)
    dense_config = model.model.config.model_copy(update={"index_topk": NUM_TOKENS})
    original, model.model.config = model.model.config, dense_config
    try:
        dense = model.full(tokens)
    finally:
        model.model.config = original
    difference = (sparse - dense).abs().amax(dim=1)
    assert difference[:topk].max() < TOLERANCE
    assert difference[topk:].max() > 0.05
