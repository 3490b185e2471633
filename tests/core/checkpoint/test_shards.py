"""Files written one tensor at a time are those that are written all at once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise.checkpoint import save_checkpoint
from mortise.checkpoint.shards import ShardWriter

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), limit=st.integers(1, 50))
def test_files_are_split_alike(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    tensors = {f"t{n}": torch.full((size,), n, dtype=torch.int8) for n, size in enumerate(sizes)}
    at_once, one_by_one = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    save_checkpoint(at_once, tensors, {}, limit)
    writer = ShardWriter(one_by_one, max_shard_bytes=limit)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    expected = {path.name: path.read_bytes() for path in at_once.iterdir()}
    del expected["config.json"]
    assert {path.name: path.read_bytes() for path in one_by_one.iterdir()} == expected


def test_another_stem(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "quant_model_weights", max_shard_bytes=1)
    writer.add("a", torch.zeros(2, dtype=torch.int8))
    writer.add("b", torch.zeros(2, 2, dtype=torch.int8).t())
    writer.close()
    index = json.loads((tmp_path / "quant_model_weights.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 6},
        "weight_map": {
            "a": "quant_model_weights-00001-of-00002.safetensors",
            "b": "quant_model_weights-00002-of-00002.safetensors",
        },
    }


def test_whoever_can_read_the_users_files_can_read_the_weights(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch()
    writer = ShardWriter(tmp_path)
    writer.add("a", torch.zeros(1))
    writer.close()
    assert (tmp_path / "model.safetensors").stat().st_mode == other.stat().st_mode
