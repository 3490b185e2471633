"""A NextN layer drafts what transformers' does, however its rows are cut, batched and paged."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.fixtures.nextn_models import PagedDraft, TransformersNextN, rewrite
from tests.fixtures.paged_models import Request, scattered_pages
from tests.fixtures.quantised_models import write
from tests.fixtures.tiny_models import YARN

from mortise.checkpoint.quantization.write.recipe import Recipe
from mortise.formats.weights import dequantise_weight
from mortise.layers.linear import QuantizedLinear
from mortise.spec.dispatch import DispatchMode
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from pathlib import Path

TOLERANCE = 1e-4
NUM_TOKENS = 85

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("deepseek_v3", {}),
    "v3, yarn, no groups": (
        "deepseek_v3",
        {"rope_parameters": YARN, "n_group": 1, "topk_group": 1},
    ),
    "v3, no latent query, halves rotated": (
        "deepseek_v3",
        {"q_lora_rank": None, "rope_interleave": False, "v_head_dim": 56},
    ),
    "v3, every other layer dense, biases, tied, another epsilon": (
        "deepseek_v3",
        {
            "first_k_dense_replace": 2,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rms_norm_eps": 0.3,
        },
    ),
    "glm4": ("glm4_moe", {}),
    "glm4, neither biases nor norms of heads, yarn": (
        "glm4_moe",
        {"attention_bias": False, "use_qk_norm": False, "rope_parameters": YARN},
    ),
    "glm4, everything rotated, one key head, groups": (
        "glm4_moe",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500.0,
                "partial_rotary_factor": 1.0,
            },
            "num_key_value_heads": 1,
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "glm4, tied, two shared experts, another epsilon": (
        "glm4_moe",
        {"tie_word_embeddings": True, "n_shared_experts": 2, "rms_norm_eps": 0.3},
    ),
    "v32": ("deepseek_v32", {}),
    "v32, yarn, ties between few index heads": (
        "deepseek_v32",
        {"rope_parameters": YARN, "index_n_heads": 2, "index_topk": 9},
    ),
    "v32, every key seen": ("deepseek_v32", {"index_topk": 512, "tie_word_embeddings": True}),
    "glm5": ("glm_moe_dsa", {}),
    "glm5, the last layer shares a choice": (
        "glm_moe_dsa",
        {"indexer_types": ["full", "shared"], "index_topk": 12},
    ),
}


@cache
def oracle(name: str) -> TransformersNextN:
    model_type, overrides = CONFIGURATIONS[name]
    return TransformersNextN(model_type, **{"num_hidden_layers": 2} | overrides)


@cache
def loaded(name: str, root: Path) -> PagedDraft:
    return PagedDraft(oracle(name).save(root / str(list(CONFIGURATIONS).index(name))))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(params=CONFIGURATIONS)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def draft(name: str, root: Path) -> PagedDraft:
    draft = loaded(name, root)
    draft.poison()
    return draft


def tokens_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def rows(tokens: torch.Tensor, start: int, end: int, pages: list[int]) -> Request:
    """The rows at positions ``[start, end)`` of a prompt, which read the tokens after theirs."""
    return Request(tokens[start + 1 : end + 1], end, pages, prompt_len=len(tokens) - 1)


def test_logits_of_the_token_after_the_next(name: str, draft: PagedDraft) -> None:
    tokens = tokens_of(NUM_TOKENS)
    request = Request(tokens[1:], NUM_TOKENS - 1, scattered_pages(NUM_TOKENS))
    hidden = oracle(name).hidden(tokens)[:-1]
    got = draft.forward(ForwardMode.PREFILL, [request], [hidden])
    assert_close(got, oracle(name).logits(tokens))


def test_chunks_then_verified_rows_then_single_ones(name: str, draft: PagedDraft) -> None:
    """A prompt in pieces, what a verification leaves, and what is drafted after it."""
    tokens, pages = tokens_of(NUM_TOKENS), scattered_pages(NUM_TOKENS)
    hidden = oracle(name).hidden(tokens)
    passes = [
        *[(ForwardMode.PREFILL, start, end) for start, end in ((0, 30), (30, 31), (31, 63))],
        *[(ForwardMode.DRAFT_EXTEND, start, start + 4) for start in (63, 67, 71)],
        *[(ForwardMode.DECODE, start, start + 1) for start in range(75, NUM_TOKENS - 1)],
    ]
    got = [
        draft.forward(mode, [rows(tokens, start, end, pages)], [hidden[start:end]])
        for mode, start, end in passes
    ]
    assert_close(torch.cat(got), oracle(name).logits(tokens))


def test_rows_written_again_after_a_rejection(name: str, draft: PagedDraft) -> None:
    """What a draft wrote for tokens that were not accepted is overwritten before it is read."""
    tokens, pages, wrong = tokens_of(50), scattered_pages(50), tokens_of(4, seed=9)
    hidden = oracle(name).hidden(tokens)
    draft.forward(ForwardMode.PREFILL, [rows(tokens, 0, 40, pages)], [hidden[:40]])
    for position in range(40, 44):
        guess = Request(wrong[position - 40 :][:1], position + 1, pages, prompt_len=49)
        draft.forward(ForwardMode.DECODE, [guess], [hidden[7:8]])
    got = [
        draft.forward(
            ForwardMode.DRAFT_EXTEND, [rows(tokens, start, start + 3, pages)], [hidden[start:][:3]]
        )
        for start in (40, 43, 46)
    ]
    assert_close(torch.cat(got), oracle(name).logits(tokens)[40:])


def test_a_batch_equals_its_requests(name: str, draft: PagedDraft) -> None:
    lengths, pages = (66, 4, 65, 20), [[9, 2], [4], [7, 3], [0]]
    sequences = [tokens_of(length + 6, seed=length) for length in lengths]
    hidden = [oracle(name).hidden(sequence) for sequence in sequences]
    expected = [oracle(name).logits(sequence) for sequence in sequences]
    ends = [0] * len(lengths)
    for mode, counts in (
        (ForwardMode.PREFILL, lengths),
        (ForwardMode.DRAFT_EXTEND, (3, 3, 3, 3)),
        (ForwardMode.DECODE, (1, 1, 1, 1)),
        (ForwardMode.DECODE, (1, 1, 1, 1)),
    ):
        starts, ends = ends, [end + count for end, count in zip(ends, counts, strict=True)]
        spans = list(zip(starts, ends, strict=True))
        requests = [
            rows(sequence, *span, own)
            for sequence, span, own in zip(sequences, spans, pages, strict=True)
        ]
        got = draft.forward(
            mode,
            requests,
            [own[start:end] for own, (start, end) in zip(hidden, spans, strict=True)],
        )
        wanted = [own[start:end] for own, (start, end) in zip(expected, spans, strict=True)]
        assert_close(got, torch.cat(wanted))


@pytest.mark.parametrize("mode", ForwardMode)
def test_a_pass_without_requests(draft: PagedDraft, mode: ForwardMode) -> None:
    assert draft.forward(mode, [], []).shape == (0, 272)
    assert draft.cached.isnan().all(), "an idle pass wrote to the cache"


def test_rows_travel_to_their_experts_as_the_pass_says(draft: PagedDraft) -> None:
    seen: list[DispatchMode] = []
    hook = draft.draft.nextn.layer.mlp.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[1])
    )
    hidden, mode = torch.ones(5, draft.main.model.config.hidden_size), ForwardMode.PREFILL
    got = [
        draft.forward(mode, [rows(tokens_of(6), 0, 5, [1])], [hidden], dispatch_mode)
        for dispatch_mode in DispatchMode
    ]
    hook.remove()
    assert seen == [*DispatchMode]
    torch.testing.assert_close(got[0], got[1])


@pytest.mark.parametrize("name", ["v32", "glm4"])
@torch.no_grad()
def test_a_quantised_layer_of_another_directory(name: str, tmp_path: Path) -> None:
    """Every projection in float8 blocks, the one that joins as well, beside a float main model."""
    model_type, overrides = CONFIGURATIONS[name]
    theirs = TransformersNextN(model_type, **overrides, num_hidden_layers=2)
    rounded = theirs.layer.eh_proj.weight.mul(16).to(torch.float8_e4m3fn)
    theirs.layer.eh_proj.weight.copy_(rounded.float() / 16)
    path, quantised = theirs.save(tmp_path / "float"), tmp_path / "fp8"
    write(path, quantised, Recipe.of("fp8-block", draft_scheme="fp8-block"))
    join = "model.layers.2.eh_proj.weight"
    say_converted(quantised, join.removesuffix(".weight"))
    rewrite(quantised, {join: rounded, f"{join}_scale_inv": torch.full((1, 1), 1 / 16)})
    draft = PagedDraft(path, quantised)
    layer = draft.draft.nextn
    projections = [one for one in layer.modules() if isinstance(one, QuantizedLinear)]
    assert layer.eh_proj in projections
    assert layer.layer.self_attn.o_proj in projections
    weight = layer.eh_proj.tensors.record()
    assert dequantise_weight(weight).equal(theirs.layer.eh_proj.weight)
    tokens = tokens_of(NUM_TOKENS)
    request = Request(tokens[1:], NUM_TOKENS - 1, scattered_pages(NUM_TOKENS))
    got = draft.forward(ForwardMode.PREFILL, [request], [theirs.hidden(tokens)[:-1]])
    expected = theirs.logits(tokens)
    # Rows and weights lose the last of four bits on their way, and nothing else.
    assert 1e-4 < (got - expected).norm() / expected.norm() < 0.1


def say_converted(path: Path, module: str) -> None:
    """Take a module off the list of those that stayed as they were."""
    file = path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"]["modules_to_not_convert"].remove(module)
    file.write_text(json.dumps(config), encoding="utf-8")
