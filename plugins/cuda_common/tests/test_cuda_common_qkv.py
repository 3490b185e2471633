"""Projections of any size are split exactly, by the program that is compiled for the chip."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.cuda_common.tests.interpreted import interpret, needs_triton

from mortise.plugin import QKVLayout, QKVParts, QKVShape
from mortise.reference.qkv import qkv_split
from mortise_cuda_common import qkv
from mortise_cuda_common.chip import EMULATED, Architecture
from mortise_cuda_common.kernels.qkv_kernel import split_kernel
from mortise_cuda_common.kernels.qkv_plan import split_plan, value_columns
from mortise_cuda_common.programs.emulated import EmulatedPrograms
from mortise_cuda_common.runtime import Runtime

if TYPE_CHECKING:
    from pathlib import Path

    from plugins.cuda_common.tests.kernel_cases import Machine

RATIOS = (1, 2, 3, 4, 8, 16)
QWEN3_NEXT = QKVShape(
    num_key_heads=16,
    num_value_heads=32,
    key_head_dim=128,
    value_head_dim=128,
    layout=QKVLayout.INTERLEAVED,
)


@pytest.fixture(scope="session")
def runtime(machine: Machine) -> Runtime:
    return Runtime(
        chip=EMULATED[Architecture.SM90],
        device=machine.device,
        emulated=machine.is_emulated,
        programs=machine.programs,
    )


def shape(key_heads: int, ratio: int, key_dim: int, value_dim: int, layout: QKVLayout) -> QKVShape:
    return QKVShape(
        num_key_heads=key_heads,
        num_value_heads=key_heads * ratio,
        key_head_dim=key_dim,
        value_head_dim=value_dim,
        layout=layout,
    )


def widths(of: QKVShape) -> tuple[int, int]:
    keys, values = of.num_key_heads * of.key_head_dim, of.num_value_heads * of.value_head_dim
    return 2 * keys + 2 * values, 2 * of.num_value_heads


def projections(
    of: QKVShape, tokens: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers among which hardly two are equal."""
    wide, narrow = widths(of)
    generator = torch.Generator().manual_seed(tokens)
    return (
        torch.randn(tokens, wide, generator=generator).to(dtype),
        torch.randn(tokens, narrow, generator=generator).to(dtype),
    )


def parts_of(parts: QKVParts) -> tuple[torch.Tensor, ...]:
    return parts.mixed_qkv, parts.z, parts.b, parts.a


def check(found: QKVParts, qkvz: torch.Tensor, ba: torch.Tensor, of: QKVShape) -> None:
    for part, wanted in zip(parts_of(found), parts_of(qkv_split(qkvz, ba, of)), strict=True):
        assert part.dtype is wanted.dtype
        assert part.is_contiguous()
        assert torch.equal(part, wanted)


def check_split(runtime: Runtime, qkvz: torch.Tensor, ba: torch.Tensor, of: QKVShape) -> None:
    """What a runtime splits, in memory of its own."""
    given = [one.to(runtime.device) for one in (qkvz, ba)]
    found = qkv.split(runtime, given[0], given[1], of)
    check(found, given[0], given[1], of)
    owners = {one.untyped_storage().data_ptr() for one in given}
    for part in parts_of(found):
        assert not part.numel() or part.untyped_storage().data_ptr() not in owners


shapes = st.builds(
    shape,
    st.integers(1, 4),
    st.sampled_from(RATIOS),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(QKVLayout),
)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 70), st.sampled_from(sorted(qkv.DTYPES, key=str)))
def test_the_program_splits_every_shape(
    runtime: Runtime, of: QKVShape, tokens: int, dtype: torch.dtype
) -> None:
    inputs = projections(of, tokens, dtype)
    check_split(runtime, *inputs, of)


@pytest.mark.parametrize("layout", QKVLayout)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("key_heads", [1, 2])
def test_heads_as_wide_as_models_have_them(
    runtime: Runtime, layout: QKVLayout, ratio: int, key_heads: int
) -> None:
    of = shape(key_heads, ratio, 128, 128, layout)
    inputs = projections(of, 11, torch.bfloat16)
    check_split(runtime, *inputs, of)


@pytest.mark.parametrize("tokens", [1, 5])
def test_the_interleaved_layout_is_transformers(runtime: Runtime, tokens: int) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    for ratio in (1, 2, 3, 8):
        of = shape(2, ratio, 16, 8, QKVLayout.INTERLEAVED)
        qkvz, ba = projections(of, tokens)
        layer = SimpleNamespace(
            num_k_heads=of.num_key_heads,
            num_v_heads=of.num_value_heads,
            head_k_dim=of.key_head_dim,
            head_v_dim=of.value_head_dim,
        )
        reorder = Qwen3NextGatedDeltaNet.fix_query_key_value_ordering
        query, key, value, z, b, a = reorder(layer, qkvz.unsqueeze(0), ba.unsqueeze(0))
        mixed = torch.cat([part.flatten(2) for part in (query, key, value)], dim=-1)
        inputs = [one.to(runtime.device) for one in (qkvz, ba)]
        found = parts_of(qkv.split(runtime, inputs[0], inputs[1], of))
        for part, wanted in zip(found, (mixed, z, b, a), strict=True):
            assert torch.equal(part.cpu(), wanted.squeeze(0))


@pytest.mark.parametrize("layout", QKVLayout)
@pytest.mark.parametrize("tokens", [70_000, 200_000])
def test_long_prompts(runtime: Runtime, layout: QKVLayout, tokens: int) -> None:
    """A grid with tokens on another axis would end at 65,535 of them."""
    of = shape(2, 2, 2, 2, layout)
    inputs = projections(of, tokens)
    check_split(runtime, *inputs, of)


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU: 20 GB are not split")
@pytest.mark.parametrize("layout", QKVLayout)
def test_a_long_prompt_of_a_published_model(runtime: Runtime, layout: QKVLayout) -> None:
    if runtime.emulated:
        pytest.skip("the emulated chip splits shorter ones")
    of = replace(QWEN3_NEXT, layout=layout)
    wide, narrow = widths(of)
    sizes = {"dtype": torch.bfloat16, "device": runtime.device}
    qkvz, ba = torch.randn(200_000, wide, **sizes), torch.randn(200_000, narrow, **sizes)
    found = parts_of(qkv.split(runtime, qkvz, ba, of))
    for first in (0, 174_760, 199_990):
        rows = slice(first, first + 10)
        wanted = parts_of(qkv_split(qkvz[rows], ba[rows], of))
        for part, expected in zip(found, wanted, strict=True):
            assert torch.equal(part[rows], expected)


def test_rows_that_lie_apart_and_columns_that_do(runtime: Runtime) -> None:
    of = shape(2, 3, 3, 5, QKVLayout.INTERLEAVED)
    qkvz, ba = (one.to(runtime.device) for one in projections(of, 40))
    gap = torch.full((40, 7), torch.nan, device=runtime.device)
    fused = torch.cat([qkvz, gap, ba], dim=1)
    apart = fused[:, : qkvz.shape[1]], fused[:, -ba.shape[1] :]
    check_split(runtime, *apart, of)
    check_split(runtime, qkvz.T.contiguous().T, ba, of)
    check_split(runtime, qkvz[:1].expand(40, -1), ba, of)


def test_b_and_a_of_another_format_and_formats_that_are_left_to_torch(runtime: Runtime) -> None:
    of = shape(2, 2, 4, 4, QKVLayout.CONTIGUOUS)
    qkvz, ba = projections(of, 9)
    check_split(runtime, qkvz.bfloat16(), ba, of)
    check_split(runtime, qkvz.double(), ba, of)


def sparse(path: Path, numbers: int) -> torch.Tensor:
    """Numbers in a file of which only what is written takes room."""
    return torch.from_file(str(path), shared=True, size=numbers, dtype=torch.bfloat16)


def test_offsets_that_32_bits_do_not_reach(tmp_path: Path) -> None:
    """The last three tokens of eleven million, whose rows are read and written further than that.

    Only their program is run.
    """
    of = shape(1, 1, 64, 64, QKVLayout.INTERLEAVED)
    plan = split_plan(of, torch.bfloat16.itemsize)
    rows = {"qkvz": 256, "ba": 2, "mixed": 192, "z": 64, "b": 1, "a": 1}
    block = 2**31 // rows["mixed"] // plan.constants["BLOCK_TOKENS"] + 1
    first = block * plan.constants["BLOCK_TOKENS"]
    assert first * rows["mixed"] >= 2**31
    memory = {name: sparse(tmp_path / name, (first + 3) * row) for name, row in rows.items()}
    qkvz, ba = projections(of, 3, torch.bfloat16)
    memory["qkvz"][-qkvz.numel() :] = qkvz.flatten()
    memory["ba"][-ba.numel() :] = ba.flatten()
    EmulatedPrograms().run_one(
        split_kernel,
        block,
        plan.programs(first + 3),
        [*memory.values(), first + 3, rows["qkvz"], rows["ba"]],
        plan.constants,
    )
    found = QKVParts(
        mixed_qkv=memory["mixed"][-3 * 192 :].view(3, 192),
        z=memory["z"][-3 * 64 :].view(3, 1, 64),
        b=memory["b"][-3:].view(3, 1),
        a=memory["a"][-3:].view(3, 1),
    )
    check(found, qkvz, ba, of)


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        shape,
        st.integers(1, 64),
        st.integers(1, 16),
        st.integers(1, 256),
        st.integers(1, 256),
        st.sampled_from(QKVLayout),
    ),
    st.sampled_from((2, 4)),
    st.integers(0, 2_000_000),
)
def test_every_block_is_one_that_triton_takes(of: QKVShape, itemsize: int, tokens: int) -> None:
    plan = split_plan(of, itemsize)
    for name in ("BLOCK_TOKENS", "KEY_BLOCK", "VALUE_BLOCK", "HEAD_BLOCK"):
        assert plan.constants[name].bit_count() == 1
    assert plan.constants["KEY_BLOCK"] >= of.key_head_dim
    assert plan.constants["HEAD_BLOCK"] >= of.num_value_heads
    blocks = plan.programs(tokens) // of.num_key_heads
    assert (blocks - 1) * plan.constants["BLOCK_TOKENS"] < max(1, tokens)
    assert blocks * plan.constants["BLOCK_TOKENS"] >= tokens
    assert plan.programs(tokens) < 2**31


def test_blocks_of_models_leave_nothing_over() -> None:
    plan = split_plan(QWEN3_NEXT, 2)
    assert (plan.constants["BLOCK_TOKENS"], plan.constants["VALUE_BLOCK"]) == (8, 256)
    assert [value_columns(ratio * 128) for ratio in RATIOS] == [128, 256, 128, 512, 1024, 1024]
    assert value_columns(300) == 512


@needs_triton
@pytest.mark.parametrize("layout", QKVLayout)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (3, 3, 5, 3, 70), (2, 2, 8, 6, 33)])
def test_tritons_own_interpreter_agrees(layout: QKVLayout, sizes: tuple[int, ...]) -> None:
    *heads, tokens = sizes
    of = shape(heads[0], heads[1], heads[2], heads[3], layout)
    inputs = projections(of, tokens)
    found = qkv_split(*inputs, of)
    for part in parts_of(found):
        part.fill_(torch.nan)
    plan = split_plan(of, 4)
    interpret(
        split_kernel,
        plan.programs(tokens),
        [*inputs, *parts_of(found), tokens, *(one.stride(0) for one in inputs)],
        plan.constants,
    )
    check(found, *inputs, of)
