"""The experts of one rank: our apply by each runner, DeepGEMM alone, and a public Triton MoE."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.cuda import deep_gemm_alone
from benchmarks.cuda.rows import Row
from benchmarks.cuda.subjects import by_runner
from mortise.errors import MortiseError
from mortise.formats.fp8 import GROUP as BLOCK
from mortise.plugin import (
    DispatchDtype,
    DispatchMode,
    DispatchRequest,
    ExpertWeights,
    ModelRole,
    Routing,
    StoredWeight,
    TokenDispatcherRequest,
    WeightScheme,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.cuda.clock import Clock
    from mortise.backends import BoundBackend
    from mortise.plugin import DispatchedTokens

NAME = "experts"
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The experts of one rank.

    Args:
        name: in words.
        experts: of this rank.
        hidden, intermediate: H and I.
        chosen: experts that each token chooses among them.
    """

    name: str
    experts: int
    hidden: int
    intermediate: int
    chosen: int


SHAPES = (
    # 256 experts in 8 ranks: of the 8 that a token chooses, one is here on average.
    Shape(name="DeepSeek-V3, 32 of 7168 x 2048", experts=32, hidden=7168,
          intermediate=2048, chosen=1),
    Shape(name="DeepSeek-V3, 32 of 7168 x 2048, 8 chosen", experts=32, hidden=7168,
          intermediate=2048, chosen=8),
    Shape(name="narrow, 256 of 7168 x 256", experts=256, hidden=7168, intermediate=256, chosen=8),
)  # fmt: skip


def measure(
    backend: str,
    device: str | None,
    clock: Clock,
    shapes: tuple[Shape, ...] = SHAPES,
    tokens: tuple[int, ...] = TOKENS,
) -> Iterator[Row]:
    """Every shape with every number of tokens, both exchanges.

    Args:
        backend: what is measured.
        device: as of the engine.
        clock: of the device.
        shapes: experts.
        tokens: numbers of tokens.
    """
    subjects = dict(by_runner(backend, device))
    missing = {name: one for name, one in subjects.items() if isinstance(one, str)}
    present = {name: one for name, one in subjects.items() if not isinstance(one, str)}
    for shape in shapes:
        experts = _experts(shape, clock.device)
        for mode in DispatchMode:
            for count in tokens:
                yield _row(shape, experts, mode, count, clock, present, missing)


def _row(
    shape: Shape,
    experts: ExpertWeights,
    mode: DispatchMode,
    tokens: int,
    clock: Clock,
    subjects: dict[str, BoundBackend],
    missing: dict[str, str],
) -> Row:
    hidden = torch.randn(tokens, shape.hidden, device=clock.device).bfloat16()
    scores = torch.rand(tokens, shape.experts, device=clock.device)
    weights, ids = scores.topk(shape.chosen, dim=-1)
    routing = Routing(topk_ids=ids, topk_weights=weights)
    ways: dict[str, Callable[[], object]] = {}
    for name, subject in subjects.items():
        ways[name] = _apply(subject, shape, experts, mode, hidden, routing)
    missing = dict(missing)
    try:
        alone = deep_gemm_alone.library(clock.device)
        arrived, _ = _arrived(subjects["deep_gemm"], shape, experts, mode, hidden, routing)
        ways["DeepGEMM's two products alone"] = deep_gemm_alone.products(alone, arrived, experts)
    except (KeyError, MortiseError) as error:
        missing["DeepGEMM's two products alone"] = str(error)
    if mode is DispatchMode.NORMAL:
        try:
            ways["vllm fused_experts, exchange included"] = _vllm(experts, hidden, routing)
        except (ImportError, AttributeError) as error:
            missing["vllm fused_experts"] = f"{type(error).__name__}: {error}"
    times = clock.microseconds(ways)
    flops = 2 * tokens * shape.chosen * shape.hidden * shape.intermediate * 3
    touched = min(shape.experts, tokens * shape.chosen)
    nbytes = touched * shape.hidden * shape.intermediate * 3
    figures = {
        name: {"TFLOPS": flops / taken * 1e-6, "weights, GB/s": nbytes / taken * 1e-3}
        for name, taken in times.items()
    }
    case = f"{shape.name}, {mode.value}, {tokens:,} tokens"
    return Row(
        benchmark=NAME,
        case=case,
        microseconds=times,
        figures=figures,
        missing=missing,
        sizes={
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "rows_per_expert": tokens * shape.chosen / shape.experts,
        },
    )


def _apply(
    subject: BoundBackend,
    shape: Shape,
    experts: ExpertWeights,
    mode: DispatchMode,
    hidden: torch.Tensor,
    routing: Routing,
) -> Callable[[], object]:
    """The experts of one backend on rows that its own exchange has brought already."""
    arrived, prepared = _arrived(subject, shape, experts, mode, hidden, routing)
    return lambda: subject.ops.quantized_moe_apply(arrived, prepared, torch.bfloat16)


def _arrived(
    subject: BoundBackend,
    shape: Shape,
    experts: ExpertWeights,
    mode: DispatchMode,
    hidden: torch.Tensor,
    routing: Routing,
) -> tuple[DispatchedTokens, ExpertWeights]:
    ops = subject.ops
    decision = ops.resolve_dispatch_dtype(
        DispatchRequest(
            role=ModelRole.MAIN,
            layer=experts.layer,
            mode=mode,
            override=None,
            scheme_w13=WeightScheme.FP8_BLOCK,
            scheme_w2=WeightScheme.FP8_BLOCK,
            accepted=(DispatchDtype.FP8_E4M3, DispatchDtype.BF16),
            requested=DispatchDtype.FP8_E4M3,
            compute_dtype=torch.bfloat16,
        )
    )
    prepared = ops.prepare_expert_weights(experts, decision)
    dispatcher: Any = ops.create_token_dispatcher(
        TokenDispatcherRequest(
            role=ModelRole.MAIN,
            layer=experts.layer,
            num_experts=shape.experts,
            num_experts_per_tok=shape.chosen,
            hidden_size=shape.hidden,
            mode=mode,
            max_tokens_per_rank=max(128, hidden.shape[0]),
            format=decision.format,
        )
    )
    arrived, _ = dispatcher.dispatch(hidden, routing, decision.format)
    return arrived, prepared


def _vllm(experts: ExpertWeights, hidden: torch.Tensor, routing: Routing) -> Callable[[], object]:
    """The most widely used public Triton fused MoE, where it is installed."""
    fused = importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe")
    quant = importlib.import_module("vllm.model_executor.layers.fused_moe.config")
    version = importlib.metadata.version("vllm")
    config = quant.fp8_w8a8_moe_quant_config(
        w1_scale=experts.w13.scale, w2_scale=experts.w2.scale, block_shape=[BLOCK, BLOCK]
    )
    ids = routing.topk_ids.int()

    def call() -> object:
        return fused.fused_experts(
            hidden, experts.w13.weight, experts.w2.weight, routing.topk_weights, ids,
            quant_config=config,
        )  # fmt: skip

    try:
        call()
    except Exception as error:
        raise ImportError(f"vllm {version}: {error}") from error
    return call


def _experts(shape: Shape, device: torch.device) -> ExpertWeights:
    """Random weights in fp8 blocks; random, because zeros take less power and so less time."""

    def stored(rows: int, columns: int, num_parts: int) -> StoredWeight:
        size = (shape.experts, rows, columns)
        weight = torch.empty(size, dtype=torch.float8_e4m3fn, device=device)
        for one in weight:
            one.copy_(torch.randn(rows, columns, device=device).clamp(-8, 8))
        blocks = (shape.experts, num_parts * -(-rows // num_parts // BLOCK), -(-columns // BLOCK))
        scale = torch.rand(blocks, device=device) * 0.01 + 0.005
        return StoredWeight(
            scheme=WeightScheme.FP8_BLOCK, weight=weight, scale=scale, num_parts=num_parts
        )

    return ExpertWeights(
        layer="measured",
        w13=stored(2 * shape.intermediate, shape.hidden, 2),
        w2=stored(shape.hidden, shape.intermediate, 1),
        num_local_experts=shape.experts,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
    )
