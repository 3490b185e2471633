"""However a sequence is cut, batched and paged, every pass over the cache gives the same logits."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.fixtures.paged_models import PagedModel, Request, scattered_pages
from tests.fixtures.tiny_models import save_tiny

from mortise.spec.paged_mqa import IndexKeyDtype
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from pathlib import Path

FP8_KEYS = "sparse with float8 keys"
SHARED_FP8_KEYS = "choices shared with float8 keys"
SHARED: dict[str, Any] = {
    "model_type": "glm_moe_dsa",
    "indexer_types": ["full", "shared", "full"],
}
MODELS: dict[str, dict[str, Any]] = {
    "sparse": {"num_hidden_layers": 2},
    FP8_KEYS: {"num_hidden_layers": 2},
    "sparse with ties": {"num_hidden_layers": 2, "index_n_heads": 2},
    "dense": {"num_hidden_layers": 2, "model_type": "deepseek_v3"},
    "grouped queries": {"num_hidden_layers": 2, "model_type": "glm4_moe"},
    "choices shared": SHARED,
    SHARED_FP8_KEYS: SHARED,
}
TOLERANCE = 1e-4
AROUND_PAGE_ENDS = (1, 63, 64, 65, 128)


@cache
def loaded(name: str, root: Path) -> PagedModel:
    path = root / name.replace(" ", "_")
    return PagedModel(
        save_tiny(path, tokenizer=False, **MODELS[name]),
        num_pages=16,
        index_key_dtype=IndexKeyDtype.FP8_E4M3 if "float8" in name else IndexKeyDtype.COMPUTE,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, root: Path) -> PagedModel:
    model = loaded(request.param, root)
    model.poison()
    return model


def tokens_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert got.isfinite().all(), "a row that nobody wrote was read"
    difference = float((got - expected).abs().max()) if got.numel() else 0.0
    assert difference < TOLERANCE, f"logits differ by {difference}"


@pytest.mark.parametrize("length", AROUND_PAGE_ENDS)
def test_decoding_after_a_prompt_that_ends_near_a_page(model: PagedModel, length: int) -> None:
    tokens = tokens_of(length + 3)
    expected = model.full(tokens)
    model.poison()
    pages = scattered_pages(len(tokens), first=2)
    assert_close(model.stepwise(tokens, [length], pages), expected)


@pytest.mark.parametrize("chunks", [[64, 64], [63, 1, 1], [1, 127], [50, 50, 20]])
def test_chunks(model: PagedModel, chunks: list[int]) -> None:
    tokens = tokens_of(130)
    expected = model.full(tokens)
    model.poison()
    assert_close(model.stepwise(tokens, chunks, scattered_pages(len(tokens))), expected)


def test_decoding_every_token_from_the_first(model: PagedModel) -> None:
    tokens = tokens_of(20)
    expected = model.full(tokens)
    model.poison()
    assert_close(model.stepwise(tokens, [1], scattered_pages(len(tokens))), expected)


def test_a_ragged_batch_equals_its_requests_alone(model: PagedModel) -> None:
    lengths = (65, 3, 64, 130)
    sequences = [tokens_of(length + 1, seed=length) for length in lengths]
    expected = [model.full(sequence) for sequence in sequences]
    pages = [[9, 2], [4], [7, 3], [0, 11, 5]]
    model.poison()
    prefilled = model.forward(
        ForwardMode.PREFILL,
        [
            Request(sequence[:-1], length, own, prompt_len=length + 1)
            for sequence, length, own in zip(sequences, lengths, pages, strict=True)
        ],
    )
    assert_close(prefilled, torch.cat([logits[:-1] for logits in expected]))
    decoded = model.forward(
        ForwardMode.DECODE,
        [
            Request(sequence[-1:], length + 1, own, prompt_len=length + 1)
            for sequence, length, own in zip(sequences, lengths, pages, strict=True)
        ],
    )
    assert_close(decoded, torch.cat([logits[-1:] for logits in expected]))


def test_one_request_cannot_see_anothers_broken_rows(model: PagedModel) -> None:
    """A neighbour in the batch whose cache holds NaN loses its own logits and no others."""
    sequences, pages = [tokens_of(40, seed=1), tokens_of(100, seed=2)], [[3], [5, 6]]
    prompts = [
        Request(tokens[:-1], len(tokens) - 1, own)
        for tokens, own in zip(sequences, pages, strict=True)
    ]
    newest = [
        Request(tokens[-1:], len(tokens), own) for tokens, own in zip(sequences, pages, strict=True)
    ]
    model.forward(ForwardMode.PREFILL, prompts)
    expected = model.forward(ForwardMode.DECODE, newest)
    for cached in model.cached(0):
        cached[5:7] = torch.nan
    got = model.forward(ForwardMode.DECODE, newest)
    assert got[1].isnan().all()
    assert_close(got[:1], expected[:1])


def test_pages_that_another_request_left_behind(model: PagedModel) -> None:
    tokens = tokens_of(100)
    expected = model.full(tokens, pages=[2, 6])
    model.full(tokens_of(128, seed=9), pages=[6, 2])
    got = model.stepwise(tokens, [30, 40], pages=[6, 2])
    assert_close(got, expected)


def test_a_preempted_request_computed_again(model: PagedModel) -> None:
    """Generated tokens that come back as a prefill get the logits that they had when decoded."""
    prompt, generated = tokens_of(50), tokens_of(20, seed=4)
    tokens = torch.cat([prompt, generated])
    pages = [1, 8]
    before = [model.forward(ForwardMode.PREFILL, [Request(prompt, 50, pages, prompt_len=50)])]
    before += [
        model.forward(
            ForwardMode.DECODE, [Request(generated[i : i + 1], 51 + i, pages, prompt_len=50)]
        )
        for i in range(len(generated))
    ]
    model.poison()
    again = model.forward(ForwardMode.PREFILL, [Request(tokens, 70, [4, 0], prompt_len=50)])
    assert_close(again, torch.cat(before))


@pytest.mark.parametrize("mode", [ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND])
def test_several_tokens_of_a_request_equal_single_decoding(
    model: PagedModel, mode: ForwardMode
) -> None:
    prompts = [tokens_of(62, seed=1), tokens_of(20, seed=2)]
    drafts = [tokens_of(4, seed=3), tokens_of(4, seed=4)]
    pages = [[3, 9], [12]]

    def prefill() -> None:
        model.poison()
        model.forward(
            ForwardMode.PREFILL,
            [Request(prompt, len(prompt), own) for prompt, own in zip(prompts, pages, strict=True)],
        )

    prefill()
    singles = []
    for prompt, draft, own in zip(prompts, drafts, pages, strict=True):
        singles += [
            model.forward(ForwardMode.DECODE, [Request(draft[i : i + 1], len(prompt) + i + 1, own)])
            for i in range(len(draft))
        ]
    prefill()
    together = model.forward(
        mode,
        [
            Request(draft, len(prompt) + len(draft), own)
            for prompt, draft, own in zip(prompts, drafts, pages, strict=True)
        ],
    )
    assert_close(together, torch.cat(singles))


@pytest.mark.parametrize("mode", ForwardMode)
def test_a_pass_without_requests(model: PagedModel, mode: ForwardMode) -> None:
    assert model.forward(mode, []).shape == (0, 272)
    written = [not cached.isnan().all() for cached in model.cached(0)]
    assert not any(written), "an idle pass wrote to the cache"


def test_a_request_without_new_tokens_beside_one_with(model: PagedModel) -> None:
    tokens = tokens_of(30)
    expected = model.full(tokens, pages=[1])
    got = model.forward(
        ForwardMode.PREFILL,
        [
            Request(tokens[:0], 30, [1], prompt_len=30),
            Request(tokens, 30, [2], prompt_len=30),
        ],
    )
    assert_close(got, expected)
