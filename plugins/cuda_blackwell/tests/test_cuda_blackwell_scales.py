"""Scales in tiles, judged by torch's own arrangement and by the offsets that cuBLAS documents."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.cuda_blackwell.tests.nvfp4_cases import generator

from mortise_cuda_blackwell.scales import from_tiles, to_tiles

if TYPE_CHECKING:
    from collections.abc import Callable

THEIRS = Path(torch.__file__).parent / "testing" / "_internal" / "common_quantized.py"
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 260), st.integers(1, 13))


def their_arrangement() -> Callable[[torch.Tensor], torch.Tensor]:
    """The functions alone: their module imports what only torch's own tests need."""
    module = ast.parse(THEIRS.read_text(encoding="utf-8"))
    wanted = {"to_blocked", "ceil_div"}
    module.body = [
        node for node in module.body if isinstance(node, ast.FunctionDef) and node.name in wanted
    ]
    assert len(module.body) == len(wanted)
    names: dict[str, object] = {"torch": torch}
    exec(compile(module, str(THEIRS), "exec"), names)
    return cast("Callable[[torch.Tensor], torch.Tensor]", names["to_blocked"])


def scales(shape: tuple[int, int, int]) -> torch.Tensor:
    """Any finite e4m3 numbers, none of them zero."""
    codes = torch.randint(1, 127, shape, generator=generator(sum(shape)), dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn)


@given(SHAPES)
@settings(max_examples=40, deadline=None)
def test_tiles_are_those_of_torch(shape: tuple[int, int, int]) -> None:
    given_scales, to_blocked = scales(shape), their_arrangement()
    tiles = to_tiles(given_scales)
    rows, columns = -(-shape[1] // 128), -(-shape[2] // 4)
    assert tiles.shape == (32, 4, rows, 4, columns, shape[0])
    memory = tiles.permute(5, 2, 4, 0, 1, 3)
    assert memory.is_contiguous()
    for batch in range(shape[0]):
        theirs = to_blocked(given_scales[batch].view(torch.uint8))
        assert torch.equal(memory[batch].flatten().view(torch.uint8), theirs)


@given(SHAPES)
@settings(max_examples=40, deadline=None)
def test_every_scale_stands_at_its_documented_offset(shape: tuple[int, int, int]) -> None:
    given_scales = scales(shape)
    batch, rows, columns = shape
    memory = to_tiles(given_scales).permute(5, 2, 4, 0, 1, 3).reshape(batch, -1)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    tile = row // 128 * -(-columns // 4) + column // 4
    offset = (tile * 32 + row % 32) * 16 + row % 128 // 32 * 4 + column % 4
    found = memory.view(torch.uint8)[:, offset]
    assert torch.equal(found, given_scales.view(torch.uint8))
    assert int(memory.view(torch.uint8).count_nonzero()) == given_scales.numel()


@given(SHAPES)
@settings(max_examples=40, deadline=None)
def test_there_and_back(shape: tuple[int, int, int]) -> None:
    given_scales = scales(shape)
    back = from_tiles(to_tiles(given_scales), shape[1], shape[2])
    assert torch.equal(back.view(torch.uint8), given_scales.view(torch.uint8))


def test_the_product_indexes_rows_and_columns_by_their_digits() -> None:
    """The logical index of FlashInfer: (m % 32, m // 32 % 4, m // 128, k % 4, k // 4, batch)."""
    given_scales = scales((2, 200, 7))
    tiles = to_tiles(given_scales).view(torch.uint8)
    for batch, row, column in ((0, 0, 0), (1, 199, 6), (0, 131, 5), (1, 70, 3)):
        place = (row % 32, row // 32 % 4, row // 128, column % 4, column // 4, batch)
        assert tiles[place] == given_scales.view(torch.uint8)[batch, row, column]
