"""Grouped-query attention over pages equals transformers' layers over one whole sequence."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.fixtures.paged_models import CPU, reference_context, scattered_pages
from torch import nn

from mortise.kv.key_values import KeyValuePool
from mortise.layers.grouped_attention import GroupedQueryAttention, GroupedShape
from mortise.layers.norm import RMSNorm
from mortise.layers.paged_attention import BatchLayout
from mortise.layers.paged_grouped_attention import PagedGroupedAttention
from mortise.layers.rotary import RotaryEmbedding
from mortise.spec.dispatch import DispatchMode
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from collections.abc import Sequence

HIDDEN, LAYER, THETA, EPS = 48, 1, 500.0, 1e-5
TOLERANCE = 1e-5


class ZeroCentredNorm(nn.Module):
    """Qwen3-Next's: the stored weight is the distance from one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden, self.weight.shape, 1 + self.weight, EPS)


CASES: dict[str, dict[str, Any]] = {
    "glm, half rotated, biases, norms": {
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
    },
    "glm, one head for all, all rotated": {"num_key_value_heads": 1, "partial_rotary_factor": 1.0},
    "glm, a head for each, a quarter rotated": {
        "num_key_value_heads": 6,
        "partial_rotary_factor": 0.25,
        "use_qk_norm": True,
    },
    "qwen, gated, a quarter rotated": {"partial_rotary_factor": 0.25},
    "qwen, gated, biases": {"attention_bias": True, "partial_rotary_factor": 0.5},
}


OTHERS = {"use_qk_norm", "partial_rotary_factor"}


def sizes(name: str) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": False,
        **{key: value for key, value in CASES[name].items() if key not in OTHERS},
    }


def rope_parameters(name: str) -> dict[str, Any]:
    factor = CASES[name]["partial_rotary_factor"]
    return {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": factor}


@cache
def theirs(name: str) -> tuple[nn.Module, nn.Module]:
    """Transformers' attention and what makes its rotations."""
    from transformers import Glm4MoeConfig, Qwen3NextConfig
    from transformers.models.glm4_moe import modeling_glm4_moe as glm
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    fields = {
        **sizes(name),
        "rope_parameters": rope_parameters(name),
        "rms_norm_eps": EPS,
        "attn_implementation": "eager",
    }
    attention: nn.Module
    rotary: nn.Module
    if name.startswith("glm"):
        of_glm = Glm4MoeConfig(**fields, use_qk_norm=CASES[name].get("use_qk_norm", False))
        attention = glm.Glm4MoeAttention(of_glm, LAYER)
        rotary = glm.Glm4MoeRotaryEmbedding(of_glm)
    else:
        of_qwen = Qwen3NextConfig(**fields)
        attention = qwen.Qwen3NextAttention(of_qwen, LAYER)
        rotary = qwen.Qwen3NextRotaryEmbedding(of_qwen)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return attention.eval(), rotary


@cache
def ours(name: str) -> GroupedQueryAttention:
    gated = name.startswith("qwen")
    attention = GroupedQueryAttention(
        LAYER,
        GroupedShape(
            **sizes(name), output_gate=gated, output_bias=gated and sizes(name)["attention_bias"]
        ),
        reference_context(),
        "attention",
        qk_norm=ZeroCentredNorm if gated else _norm if CASES[name].get("use_qk_norm") else None,
    )
    attention.load_state_dict(theirs(name)[0].state_dict())
    return attention


def _norm(size: int) -> nn.Module:
    return RMSNorm(size, EPS)


def hidden_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def expected(name: str, hidden_TH: torch.Tensor) -> torch.Tensor:
    """What transformers makes of one whole sequence."""
    attention, rotary = theirs(name)
    batch = hidden_TH.unsqueeze(0)
    mask = torch.full((len(hidden_TH), len(hidden_TH)), float("-inf")).triu(1)
    rotation = rotary(batch, torch.arange(len(hidden_TH)).unsqueeze(0))
    output: torch.Tensor = attention(batch, rotation, mask[None, None])[0]
    return output[0]


class Cached:
    """Our layer over a cache whose every row is NaN until a token writes it."""

    def __init__(self, name: str) -> None:
        self.attention = ours(name)
        shape = self.attention.shape
        factor = CASES[name]["partial_rotary_factor"]
        self.rotary = RotaryEmbedding(int(shape.head_dim * factor), THETA, 512, None)
        self.pool = KeyValuePool(
            num_layers=2,
            num_pages=16,
            num_heads=shape.num_key_value_heads,
            key_dim=shape.head_dim,
            value_dim=shape.head_dim,
            dtype=torch.float32,
            device=CPU,
        )
        for layer in range(2):
            self.pool.keys(layer).fill_(torch.nan)
            self.pool.values(layer).fill_(torch.nan)

    @torch.inference_mode()
    def forward(
        self,
        mode: ForwardMode,
        hidden: Sequence[torch.Tensor],
        context_lens: Sequence[int],
        pages: Sequence[Sequence[int]],
    ) -> torch.Tensor:
        """New tokens of several requests."""
        layout = BatchLayout.build(mode, [len(own) for own in hidden], context_lens, pages, CPU)
        attend = PagedGroupedAttention(self.pool, layout)
        rows = torch.cat(list(hidden)) if hidden else torch.empty(0, HIDDEN)
        output: torch.Tensor = self.attention(rows, self.rotary(attend.positions), attend)
        return output


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    case: str = request.param
    return case


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.isfinite().all(), "a row that nobody wrote was read"
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("length", [1, 64, 130])
def test_a_whole_sequence(name: str, length: int) -> None:
    hidden = hidden_of(length)
    got = Cached(name).forward(ForwardMode.PREFILL, [hidden], [length], [scattered_pages(length)])
    wanted = expected(name, hidden)
    assert wanted.abs().max() > 0.5
    assert_close(got, wanted)


def test_chunks_then_single_tokens(name: str) -> None:
    hidden, pages = hidden_of(70), [scattered_pages(70)]
    cached = Cached(name)
    parts = [
        cached.forward(ForwardMode.PREFILL, [hidden[:50]], [50], pages),
        cached.forward(ForwardMode.PREFILL, [hidden[50:63]], [63], pages),
        *(
            cached.forward(ForwardMode.DECODE, [hidden[end - 1 : end]], [end], pages)
            for end in range(64, 71)
        ),
    ]
    assert_close(torch.cat(parts), expected(name, hidden))


def test_ragged_requests_together(name: str) -> None:
    """Of all modes, with as many new tokens each and with different numbers, or none."""
    lengths, pages = (66, 9, 131), [[9, 2], [4], [0, 11, 5]]
    hidden = [hidden_of(length, seed=length) for length in lengths]
    wanted = [expected(name, own) for own in hidden]
    cached = Cached(name)
    starts = (0, 0, 0)
    steps = [
        (ForwardMode.PREFILL, (60, 3, 125)),
        (ForwardMode.TARGET_VERIFY, (63, 6, 128)),
        (ForwardMode.DRAFT_EXTEND, (65, 7, 128)),
        (ForwardMode.DECODE, (66, 8, 129)),
        (ForwardMode.PREFILL, (66, 9, 131)),
    ]
    for mode, ends in steps:
        spans = list(zip(starts, ends, strict=True))
        got = cached.forward(
            mode,
            [own[start:end] for own, (start, end) in zip(hidden, spans, strict=True)],
            ends,
            pages,
        )
        parts = [own[start:end] for own, (start, end) in zip(wanted, spans, strict=True)]
        assert_close(got, torch.cat(parts))
        starts = ends


@pytest.mark.parametrize("mode", ForwardMode)
def test_no_token(mode: ForwardMode) -> None:
    cached = Cached("glm, half rotated, biases, norms")
    assert cached.forward(mode, [], [], []).shape == (0, HIDDEN)
    assert cached.forward(mode, [hidden_of(0)], [0], [[]]).shape == (0, HIDDEN)
    assert cached.pool.keys(LAYER).isnan().all()


def test_only_its_own_layer_is_written_and_only_its_own_slots() -> None:
    cached = Cached("qwen, gated, biases")
    cached.forward(ForwardMode.PREFILL, [hidden_of(65)], [65], [[3, 7]])
    for pages in (cached.pool.keys, cached.pool.values):
        assert pages(0).isnan().all()
        written = pages(LAYER).isfinite().all(dim=(2, 3))
        assert written[3].all()
        assert written[7].tolist() == [True] + [False] * 63
        assert int(written.sum()) == 65


def test_the_exchange_of_the_layout_is_handed_on() -> None:
    layout = BatchLayout.build(ForwardMode.IDLE, [], [], [], CPU)
    attend = PagedGroupedAttention(Cached("qwen, gated, biases").pool, layout)
    assert attend.dispatch_mode is DispatchMode.NORMAL
