"""Hooks that a graph may capture never ask the device for a number: here it has none to give."""

# Tensors of torch's device meta have shapes and no numbers: whatever reads one, or mixes them with
# tensors of the CPU, is an error.

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from plugins.cuda_common.tests.expert_cases import BF16, FORMS, FP8, TILED, random_experts

from mortise.plugin import (
    DispatchMode,
    ForwardMode,
    IndexKeyPages,
    LinearWeight,
    ModelRole,
    PagedMQABuffers,
    PagedMQAMetadata,
    QKVLayout,
    QKVShape,
    Routing,
    RowLayout,
    ScaleFormat,
    StoredWeight,
    TokenDispatcherRequest,
    WeightScheme,
)
from mortise_cuda_common import moe, qkv
from mortise_cuda_common.chip import EMULATED, Architecture
from mortise_cuda_common.experts import prepare_expert_weights
from mortise_cuda_common.indexer import Indexer
from mortise_cuda_common.libraries.deep_gemm import DeepGEMM
from mortise_cuda_common.libraries.deep_gemm_names import NAMES, resolve
from mortise_cuda_common.linear import prepare_linear_weight, quantized_linear
from mortise_cuda_common.local import ProgramDispatcher
from mortise_cuda_common.products.select import Products
from mortise_cuda_common.programs.base import Programs
from mortise_cuda_common.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mortise.plugin import DispatchFormat

META = torch.device("meta")
CHIP = EMULATED[Architecture.SM90]
VERSION = "0.1.5.post1"
MOST_PROGRAMS = 2**31 - 1


class LaunchesNothing(Programs):
    """Looks at what a launch is given."""

    def __init__(self) -> None:
        self.launched = 0

    def launch(
        self,
        source: Callable[..., None],
        grid: int,
        arguments: Sequence[Any],
        constants: Mapping[str, int | float | bool],
        *,
        num_warps: int = 4,
        num_stages: int = 3,
    ) -> None:
        del constants, num_warps, num_stages
        assert 0 < grid <= MOST_PROGRAMS
        for one in arguments:
            if isinstance(one, torch.Tensor):
                assert one.device == META, f"{source.__name__} is given a tensor of the host"
            else:
                assert type(one) is int
        self.launched += 1


@dataclass
class Library:
    """DeepGEMM's functions, which compute nothing, and what was called."""

    calls: int = 0

    def functions(self) -> SimpleNamespace:
        names = {name: self.compute for names in NAMES.values() for name in names}
        return SimpleNamespace(
            **{
                **names,
                "get_mk_alignment_for_contiguous_layout": lambda: 128,
                "get_num_sms": lambda: CHIP.num_sms,
                "get_mn_major_tma_aligned_tensor": lambda scales: scales,
                "get_paged_mqa_logits_metadata": self.compute,
                "fp8_paged_mqa_logits": self.score,
            }
        )

    def compute(self, *arguments: Any) -> None:
        for one in arguments:
            for tensor in one if isinstance(one, tuple) else (one,):
                assert not isinstance(tensor, torch.Tensor) or tensor.device == META
        self.calls += 1

    def score(self, query: torch.Tensor, *others: Any) -> torch.Tensor:
        self.compute(query, *others)
        return query.new_empty(query.shape[0] * query.shape[1], others[5], dtype=torch.float32)


@pytest.fixture
def library() -> Library:
    return Library()


@pytest.fixture(params=["triton", "deep_gemm"])
def products(request: pytest.FixtureRequest, library: Library) -> Products:
    deep_gemm = DeepGEMM(
        chip=CHIP, version=VERSION, resolved=resolve(library.functions(), VERSION, META)
    )
    runtime = Runtime(
        chip=CHIP, device=META, emulated=False, programs=LaunchesNothing(), deep_gemm=deep_gemm
    )
    return Products(runtime, request.param)


def launched(products: Products) -> int:
    programs = products.runtime.programs
    assert isinstance(programs, LaunchesNothing)
    return programs.launched


def meta(stored: StoredWeight) -> StoredWeight:
    scale = None if stored.scale is None else stored.scale.to(META)
    return replace(stored, weight=stored.weight.to(META), scale=scale)


def formats(form: str) -> list[DispatchFormat]:
    """What travels to experts of a form, in every layout."""
    plain = [BF16]
    if FORMS[form].scheme is WeightScheme.FP8_BLOCK:
        powers = FORMS[form].scale_format is ScaleFormat.UE8M0
        plain.append(replace(FP8, scale_format=ScaleFormat.UE8M0) if powers else FP8)
    masked = {"row_layout": RowLayout.MASKED, "mode": DispatchMode.LOW_LATENCY}
    aligned = {"row_layout": RowLayout.GROUPED_ALIGNED, "alignment": 128}
    changes: list[dict[str, Any]] = [{}, aligned, masked]
    return [replace(one, **change) for one in plain for change in changes]


@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("form", FORMS)
def test_experts(products: Products, library: Library, form: str, tokens: int) -> None:
    experts = random_experts(form, form)
    experts = replace(experts, w13=meta(experts.w13), w2=meta(experts.w2))
    experts = prepare_expert_weights(products, experts)
    for stated in formats(form):
        request = TokenDispatcherRequest(
            role=ModelRole.MAIN,
            layer=experts.layer,
            num_experts=TILED.num_experts,
            num_experts_per_tok=2,
            hidden_size=TILED.hidden,
            mode=stated.mode,
            max_tokens_per_rank=100,
            format=stated,
        )
        dispatcher = ProgramDispatcher(products.runtime, request)
        routing = Routing(
            topk_ids=torch.empty(tokens, 2, dtype=torch.int64, device=META),
            topk_weights=torch.empty(tokens, 2, device=META),
        )
        hidden_TH = torch.empty(tokens, TILED.hidden, dtype=torch.bfloat16, device=META)
        arrived, handle = dispatcher.dispatch(hidden_TH, routing, stated)
        made = moe.quantized_moe_apply(products, arrived, experts, torch.bfloat16)
        assert made.shape == arrived.rows.shape
        assert dispatcher.combine(made, handle).shape == hidden_TH.shape
    assert launched(products)
    is_multiplied_by_it = products.runner == "deep_gemm" and "w4a16" not in form
    assert bool(library.calls) is is_multiplied_by_it


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("form", sorted(set(FORMS) - {"float"}))
def test_projections(products: Products, form: str, with_bias: bool) -> None:
    stored = random_experts(form, form).w2
    single = replace(
        stored, weight=stored.weight[0], scale=None if stored.scale is None else stored.scale[0]
    )
    linear = LinearWeight(
        layer="o_proj",
        stored=meta(single),
        bias=torch.empty(TILED.hidden, dtype=torch.bfloat16, device=META) if with_bias else None,
        out_features=TILED.hidden,
        in_features=TILED.intermediate,
    )
    prepared = prepare_linear_weight(products, linear)
    rows = torch.empty(7, TILED.intermediate, dtype=torch.bfloat16, device=META)
    assert quantized_linear(products, rows, prepared, torch.bfloat16).shape == (7, TILED.hidden)
    assert launched(products)


@pytest.mark.parametrize("next_n", [1, 2, 4])
@pytest.mark.parametrize("fp8", [True, False])
def test_index_scores(products: Products, library: Library, next_n: int, fp8: bool) -> None:
    rows, heads, dim, longest = 5, 4, 64, 300
    block = torch.empty(9, 64 * (dim + 4), dtype=torch.uint8, device=META)
    keys = block[:, : 64 * dim].view(torch.float8_e4m3fn).unflatten(1, (64, dim))
    pages = IndexKeyPages(keys=keys, scales=block[:, 64 * dim :].view(torch.float32))
    if not fp8:
        pages = IndexKeyPages(keys=torch.empty(9, 64, dim, dtype=torch.bfloat16, device=META))
    lens = torch.empty(rows, next_n, dtype=torch.int32, device=META)
    schedule = torch.empty(CHIP.num_sms + 1, 2, dtype=torch.int32, device=META)
    plan = PagedMQAMetadata(
        mode=ForwardMode.DECODE,
        rows=rows,
        next_n=next_n,
        block_size=64,
        num_workers=CHIP.num_sms,
        max_context_len=longest,
        buffers=PagedMQABuffers(lens, schedule, lens.clone()),
    )
    found = Indexer(
        products.runtime, "auto" if products.runner == "deep_gemm" else "triton"
    ).logits(
        torch.empty(rows, next_n, heads, dim, dtype=torch.bfloat16, device=META),
        pages,
        torch.empty(rows * next_n, heads, device=META),
        torch.empty(rows, 6, dtype=torch.int32, device=META),
        plan,
    )
    assert found.shape[0] == rows * next_n
    assert found.shape[1] >= longest
    assert launched(products)
    assert bool(library.calls) is (fp8 and products.runner == "deep_gemm")


@pytest.mark.parametrize("layout", QKVLayout)
def test_splits(products: Products, layout: QKVLayout) -> None:
    shape = QKVShape(
        num_key_heads=2, num_value_heads=6, key_head_dim=8, value_head_dim=8, layout=layout
    )
    qkvz, ba = (torch.empty(300, width, device=META) for width in (128, 12))
    assert qkv.split(products.runtime, qkvz, ba, shape).z.shape == (300, 6, 8)
    assert launched(products) == 1
