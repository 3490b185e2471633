from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mortise.checkpoint import CheckpointTensors, ModelDirectory, save_checkpoint
from mortise.checkpoint.save import shard_name, shards_of
from mortise.errors import WeightsError

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = {
    "a": torch.arange(4.0),
    "b": torch.ones(2, 2, dtype=torch.bfloat16),
    "c": torch.arange(12.0).reshape(3, 4).t(),
    "d": torch.tensor(3, dtype=torch.int64),
}


def test_one_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "new" / "m", TENSORS, {"model_type": "x", "größe": 1})
    directory = ModelDirectory.open(tmp_path / "new" / "m")
    assert directory.config == {"model_type": "x", "größe": 1}
    assert directory.weight_files().paths == (directory.path / "model.safetensors",)
    assert_holds(directory)


def test_several_files(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TENSORS, {}, max_shard_bytes=24)
    directory = ModelDirectory.open(tmp_path)
    files = directory.weight_files()
    assert [path.name for path in files.paths] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 16 + 8 + 48 + 8}
    # The one that is too large for a file stands alone, before the file that is still filling.
    assert index["weight_map"] == {
        "a": files.paths[1].name,
        "b": files.paths[1].name,
        "c": files.paths[0].name,
        "d": files.paths[2].name,
    }
    assert_holds(directory)


def assert_holds(directory: ModelDirectory) -> None:
    with CheckpointTensors(directory.weight_files()) as tensors:
        assert set(tensors.names()) == set(TENSORS)
        for name, expected in TENSORS.items():
            assert tensors.dtype(name) == expected.dtype
            assert torch.equal(tensors.read(name), expected)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), limit=st.integers(1, 50))
def test_files_are_split_as_huggingface_hub_splits_them(sizes: list[int], limit: int) -> None:
    tensors = {f"t{n}": torch.zeros(size, dtype=torch.int8) for n, size in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(
        tensors,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    ours = list(shards_of(tensors, limit))
    assert dict(zip(names_of(len(ours)), ours, strict=True)) == theirs.filename_to_tensors


def names_of(count: int) -> list[str]:
    return [shard_name(number, count) for number in range(1, count + 1)]


def test_transformers_reads_what_was_saved(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    theirs = LlamaForCausalLM(config)
    save_checkpoint(tmp_path, theirs.state_dict(), config.to_dict(), max_shard_bytes=600)
    assert len(ModelDirectory.open(tmp_path).weight_files().paths) > 2
    again, loading = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_two_checkpoints_do_not_share_a_directory(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TENSORS, {})
    with pytest.raises(WeightsError) as caught:
        save_checkpoint(tmp_path, TENSORS, {}, max_shard_bytes=24)
    assert str(caught.value).splitlines() == [
        f"directory '{tmp_path}' already holds weights",
        "  found: model.safetensors",
        "  expected: a directory without safetensors files",
        "  remedy: give another directory, or remove these files first",
    ]
