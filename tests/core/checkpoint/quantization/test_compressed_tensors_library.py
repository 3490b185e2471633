"""Checkpoints that the compressed-tensors library wrote and reads back itself."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch
from tests.fixtures.compressed_models import INPUT_GLOBAL_SCALE, save_compressed
from tests.fixtures.loaded_checkpoints import load_all, open_plan, shapes_of
from tests.fixtures.tiny_models import save_tiny

from mortise.formats.weights import dequantise_weight
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from pathlib import Path

EVERYTHING = ["Linear"]
NUM_LAYERS, NUM_EXPERTS = 2, 4
TINY = {"num_hidden_layers": NUM_LAYERS, "n_routed_experts": NUM_EXPERTS}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, ...]]:
    return shapes_of(save_tiny(tmp_path_factory.mktemp("float"), tokenizer=False, **TINY))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("preset", "written", "group_size", "scheme"),
    [
        ("W8A8", None, None, WeightScheme.W8A8),
        ("W4A16", None, 16, WeightScheme.W4A16),
        ("W4A16", None, None, WeightScheme.W4A16),
        ("W4A8", "pack-quantized", 16, WeightScheme.W4A8),
        ("W4A8", None, None, WeightScheme.W4A8),
        ("W4A4", None, 16, WeightScheme.W4A4),
        ("NVFP4", None, None, WeightScheme.NVFP4),
        ("NVFP4A16", None, None, WeightScheme.NVFP4),
    ],
)
def test_dequantised_weights_equal_those_of_the_library(
    tmp_path: Path,
    shapes: dict[str, tuple[int, ...]],
    preset: str,
    written: str | None,
    group_size: int | None,
    scheme: WeightScheme,
    dtype: torch.dtype,
) -> None:
    theirs = save_compressed(
        tmp_path,
        {preset: EVERYTHING},
        formats={} if written is None else {preset: written},
        group_size=group_size,
        dtype=dtype,
        **TINY,
    )
    ours = load_all(tmp_path, shapes)
    kinds = Counter(stored.scheme for stored in ours.values())
    # The head and the router of the layer of experts stay as they are.
    assert kinds == {scheme: len(theirs), WeightScheme.FLOAT: 2}
    assert len([name for name in theirs if ".experts." in name]) == 3 * NUM_EXPERTS
    for name, weight in theirs.items():
        assert torch.equal(dequantise_weight(ours[name], weight.dtype), weight), name
    plan = open_plan(tmp_path)
    assert {plan.scheme(name).group_size for name in theirs} == {group_size}
    if scheme is WeightScheme.NVFP4:
        expected = torch.tensor([1 / INPUT_GLOBAL_SCALE]) if preset == "NVFP4" else None
        assert all(ours[name].input_scale == expected for name in theirs)
