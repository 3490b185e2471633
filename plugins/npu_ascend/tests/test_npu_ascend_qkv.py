"""Projections of any size are split exactly, by launches that the device takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise.plugin import QKVLayout, QKVParts, QKVShape
from mortise_npu_ascend import qkv, vendor
from mortise_npu_ascend.emulator import triton_launch
from mortise_npu_ascend.options import Options
from mortise_npu_ascend.qkv import QKVSplitter
from mortise_npu_ascend.qkv_plan import MOST_BLOCK, MOST_OFFSET, fits, split_plan

QWEN3_NEXT = QKVShape(
    num_key_heads=16,
    num_value_heads=32,
    key_head_dim=128,
    value_head_dim=128,
    layout=QKVLayout.INTERLEAVED,
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
    """No two elements of a token are equal, nor are two tokens."""
    wide, narrow = widths(of)
    generator = torch.Generator().manual_seed(tokens)
    return (
        torch.randn(tokens, wide, generator=generator).to(dtype),
        torch.randn(tokens, narrow, generator=generator).to(dtype),
    )


def defined(qkvz: torch.Tensor, ba: torch.Tensor, of: QKVShape) -> list[np.ndarray]:
    """The split as the layouts define it, in numpy."""
    tokens, groups, heads = qkvz.shape[0], of.num_key_heads, of.num_value_heads
    keys, values = of.key_head_dim, heads // groups * of.value_head_dim
    wide, narrow = qkvz.float().numpy(), ba.float().numpy()
    if of.layout is QKVLayout.CONTIGUOUS:
        mixed, z = np.split(wide, [2 * groups * keys + groups * values], axis=1)
        b, a = np.split(narrow, 2, axis=1)
    else:
        grouped = wide.reshape(tokens, groups, 2 * keys + 2 * values)
        q, k, v, z = np.split(grouped, np.cumsum([keys, keys, values]), axis=2)
        mixed = np.concatenate(
            [part.reshape(tokens, groups * part.shape[2]) for part in (q, k, v)], axis=1
        )
        b, a = np.split(narrow.reshape(tokens, groups, 2 * (heads // groups)), 2, axis=2)
    size = (tokens, heads)
    return [mixed, z.reshape(*size, of.value_head_dim), b.reshape(size), a.reshape(size)]


def check(parts: QKVParts, qkvz: torch.Tensor, ba: torch.Tensor, of: QKVShape) -> None:
    found = (parts.mixed_qkv, parts.z, parts.b, parts.a)
    for part, wanted in zip(found, defined(qkvz, ba, of), strict=True):
        assert part.dtype is qkvz.dtype
        assert part.is_contiguous()
        for one in (qkvz, ba):
            assert not part.numel() or part.untyped_storage().data_ptr() != (
                one.untyped_storage().data_ptr()
            )
        np.testing.assert_array_equal(part.float().numpy(), wanted)


def emulated() -> QKVSplitter:
    return QKVSplitter.of(vendor.load_emulator(Options()))


shapes = st.builds(
    shape,
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(QKVLayout),
)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 70), st.sampled_from(sorted(qkv.DTYPES, key=str)))
def test_the_program_splits_every_shape(of: QKVShape, tokens: int, dtype: torch.dtype) -> None:
    inputs = projections(of, tokens, dtype)
    check(emulated().split(*inputs, of), *inputs, of)


@pytest.mark.parametrize("layout", QKVLayout)
@pytest.mark.parametrize(
    ("tokens", "key_heads"), [(0, 2), (1, 1), (1, 8), (8192, 8), (70_000, 1), (70_000, 2)]
)
def test_long_prompts(layout: QKVLayout, tokens: int, key_heads: int) -> None:
    """A program for every token and key head would be one too many from 65,536 on."""
    of = shape(key_heads, 2, 2, 2, layout)
    inputs = projections(of, tokens)
    check(emulated().split(*inputs, of), *inputs, of)


def test_rows_that_lie_apart_and_columns_that_do() -> None:
    of = shape(2, 2, 3, 5, QKVLayout.INTERLEAVED)
    wide, narrow = projections(of, 40)
    spread = torch.cat([wide, torch.full((40, 7), torch.nan)], dim=1)[:, : wide.shape[1]]
    check(emulated().split(spread, narrow, of), wide, narrow, of)
    columns = wide.T.contiguous().T
    check(emulated().split(columns, narrow, of), wide, narrow, of)


def test_several_launches_where_offsets_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of 200,000 tokens of Qwen3-Next, with a smaller limit."""
    monkeypatch.setattr("mortise_npu_ascend.qkv_plan.MOST_OFFSET", 5_000)
    monkeypatch.setattr("mortise_npu_ascend.emulator.triton_launch._MOST_OFFSET", 5_000)
    of = shape(2, 1, 4, 4, QKVLayout.INTERLEAVED)
    inputs = projections(of, 500)
    assert len(split_plan(500, of, widths(of)[0], 48).launches) > 3
    check(emulated().split(*inputs, of), *inputs, of)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 131_072 * 8),
    st.builds(
        shape,
        st.integers(1, 64),
        st.sampled_from((1, 2, 3, 4, 8)),
        st.integers(1, 256),
        st.integers(1, 256),
        st.sampled_from(QKVLayout),
    ),
    st.integers(1, 200_000),
    st.integers(0, 10_000),
)
def test_every_launch_is_one_that_the_device_takes(
    tokens: int, of: QKVShape, cores: int, gap: int
) -> None:
    stride = max(widths(of)) + gap
    plan = split_plan(tokens, of, stride, cores)
    reached = 0
    for launch in plan.launches:
        assert launch.first_token == reached
        reached += launch.num_tokens
        blocks = -(-launch.num_tokens // plan.block_tokens)
        tasks = blocks * of.num_key_heads
        assert 1 <= launch.programs <= min(65_535, cores, tasks)
        # The block that reaches furthest, and the row after it.
        assert (blocks * plan.block_tokens + 1) * stride <= MOST_OFFSET
    assert reached == tokens
    assert fits(of)
    for block in (plan.key_block, plan.value_block):
        assert plan.block_tokens * block <= max(MOST_BLOCK, block)
        assert block.bit_count() == 1


def test_the_sizes_of_a_published_model() -> None:
    wide, _ = widths(QWEN3_NEXT)
    plan = split_plan(200_000, QWEN3_NEXT, wide, 48)
    assert [launch.programs for launch in plan.launches] == [48, 48]
    assert 200_000 * wide > MOST_OFFSET
    assert (plan.block_tokens, plan.key_block, plan.value_block) == (32, 128, 256)


def test_heads_that_are_no_block_and_other_dtypes_go_to_the_reference() -> None:
    wide = shape(1, 1, 1, MOST_BLOCK + 1, QKVLayout.CONTIGUOUS)
    assert not fits(wide)
    inputs = projections(wide, 2)
    check(emulated().split(*inputs, wide), *inputs, wide)
    narrow = shape(1, 1, 2, 2, QKVLayout.CONTIGUOUS)
    inputs = projections(narrow, 2, torch.float64)
    check(emulated().split(*inputs, narrow), *inputs, narrow)


def test_torch_splits_where_triton_is_not_wanted() -> None:
    splitter = QKVSplitter.of(vendor.load_emulator(Options()), use_triton=False)
    of = shape(2, 2, 3, 5, QKVLayout.INTERLEAVED)
    inputs = projections(of, 3)
    check(splitter.split(*inputs, of), *inputs, of)


def copy(source: object, target: object, N: int) -> None:
    place = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * N + tl.arange(0, N)  # noqa: F821
    inside = place < 5
    tl.store(target + place, tl.load(source + place, mask=inside), mask=inside)  # noqa: F821


def test_a_grid_of_65536_programs_is_refused_in_the_words_of_the_launcher() -> None:
    rows = torch.zeros(4)
    with pytest.raises(RuntimeError, match="grid should be less than 65536!"):
        triton_launch.launch(copy, (8192, 8), (rows, rows), {"N": 1})


def test_an_emulated_program_may_not_leave_its_tensors() -> None:
    source, target = torch.arange(5.0), torch.full((5,), -1.0)
    triton_launch.launch(copy, (2, 2), (source, target), {"N": 2})
    assert target.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match=r"lies outside of \[0, 4\)"):
        triton_launch.launch(copy, (2, 2), (source, torch.zeros(4)), {"N": 2})
    with pytest.raises(ValueError, match="power of 2"):
        triton_launch.launch(copy, (2, 2), (source, target), {"N": 3})


INTERPRETED = """
import importlib, sys
import torch
sys.path[:] = {paths!r}
from mortise.plugin import QKVLayout, QKVShape
from mortise.reference.qkv import qkv_split
from mortise_npu_ascend.qkv import QKVSplitter, _compiled

# Numpy 2.4 makes no integer of an array of one element, which the interpreter counts on.
scope = importlib.import_module("triton.runtime.interpreter")._LangPatchScope
set_attr = scope.set_attr
def with_integers(self, owner, name, value):
    if name == "__index__":
        value = lambda tensor: int(tensor.handle.data.item())
    set_attr(self, owner, name, value)
scope.set_attr = with_integers

splitter = QKVSplitter(_compiled(), 5)
generator = torch.Generator().manual_seed(0)
for layout in QKVLayout:
    for sizes in ((1, 1, 1, 1, 1), (3, 4, 5, 3, 70), (2, 3, 8, 6, 33)):
        heads, ratio, key_dim, value_dim, tokens = sizes
        shape = QKVShape(num_key_heads=heads, num_value_heads=heads * ratio, key_head_dim=key_dim,
                         value_head_dim=value_dim, layout=layout)
        wide = 2 * heads * key_dim + 2 * heads * ratio * value_dim
        inputs = (torch.randn(tokens, wide, generator=generator),
                  torch.randn(tokens, 2 * heads * ratio, generator=generator))
        found, wanted = splitter.split(*inputs, shape), qkv_split(*inputs, shape)
        for part in ("mixed_qkv", "z", "b", "a"):
            assert torch.equal(getattr(found, part), getattr(wanted, part)), (shape, part)
print("split by", importlib.import_module("triton").__version__)
"""


@pytest.mark.skipif(
    not any(Path(path, "triton").is_dir() for path in sys.path if path),
    reason="neither triton nor triton-ascend is installed: its own interpreter was not asked",
)
def test_tritons_own_interpreter_agrees() -> None:
    """A variable switches it on, so it runs in a process of its own."""
    child = subprocess.run(
        [sys.executable, "-c", INTERPRETED.format(paths=sys.path)],
        env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith("split by 3.")
