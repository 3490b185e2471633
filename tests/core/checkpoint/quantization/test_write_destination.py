"""A directory appears whole or not at all, with everything that belongs to the model."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from tests.fixtures.quantised_models import read, save_odd, write

from mortise.checkpoint import CheckpointTensors, ModelDirectory, save_checkpoint
from mortise.checkpoint.quantization.write.destination import new_directory
from mortise.checkpoint.quantization.write.projections import select_projections
from mortise.checkpoint.quantization.write.quantise import write_quantised
from mortise.checkpoint.quantization.write.recipe import Recipe
from mortise.errors import QuantizationConfigError, WeightsError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_odd(tmp_path_factory.mktemp("models") / "odd")


def changed(model: Path, path: Path, **tensors: torch.Tensor) -> Path:
    shutil.copytree(model, path, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    save_checkpoint(path, read(model) | tensors, ModelDirectory.open(model).config)
    return path


def test_files_beside_the_weights_are_copied(model: Path, tmp_path: Path) -> None:
    source = changed(model, tmp_path / "m")
    (source / "LICENSE").write_text("free")
    (source / "pytorch_model.bin").write_text("weights in another format")
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    write(source, tmp_path / "q", Recipe.of("w8a8"))
    assert {path.name for path in (tmp_path / "q").iterdir()} == {
        "LICENSE",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (tmp_path / "q" / "LICENSE").read_text() == "free"


def test_weights_are_written_in_several_files(model: Path, tmp_path: Path) -> None:
    write(model, tmp_path / "one", Recipe.of("w4a16"))
    write(model, tmp_path / "many", Recipe.of("w4a16"), max_shard_bytes=100_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    one, many = read(tmp_path / "one"), read(tmp_path / "many")
    assert set(one) == set(many)
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_an_empty_directory_is_taken(model: Path, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    write(model, tmp_path / "q", Recipe.of("w8a8"))
    assert (tmp_path / "q" / "config.json").is_file()


@pytest.mark.parametrize(
    ("file", "holds"), [("model.safetensors", "holds weights"), ("notes.txt", "is not empty")]
)
def test_a_directory_with_files_is_left_alone(
    model: Path, tmp_path: Path, file: str, holds: str
) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / file).write_text("mine")
    with pytest.raises(WeightsError) as caught:
        write(model, tmp_path / "q", Recipe.of("w8a8"))
    assert caught.value.what == f"directory '{tmp_path / 'q'}' {holds}"
    assert caught.value.details == (f"found: {file}",)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_a_file_in_the_way(model: Path, tmp_path: Path) -> None:
    (tmp_path / "q").write_text("mine")
    with pytest.raises(WeightsError, match="is a file"):
        write(model, tmp_path / "q", Recipe.of("w8a8"))


def test_a_failure_leaves_nothing(model: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    weight = read(model)[name]
    weight[2, 3], weight[4, 5] = torch.nan, torch.inf
    source = changed(model, tmp_path / "m", **{name: weight})
    with pytest.raises(WeightsError) as caught:
        write(source, tmp_path / "q", Recipe.of("w8a8"), max_shard_bytes=100_000)
    assert caught.value.what == f"tensor {name} holds 2 elements that are not finite"
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_directory(tmp_path / "q") as unfinished:
            (unfinished / "model.safetensors").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(WeightsError, match=r"cannot be written: .*Not a directory"),
        new_directory(tmp_path / "file" / "q"),
    ):
        raise AssertionError("there is no such directory")


@pytest.mark.parametrize("recipe", [Recipe.of("fp8-block"), Recipe.of("w8a8", "modelslim")])
def test_a_quantised_model_is_not_quantised_again(
    model: Path, tmp_path: Path, recipe: Recipe
) -> None:
    write(model, tmp_path / "q", recipe)
    with pytest.raises(QuantizationConfigError) as caught:
        write(tmp_path / "q", tmp_path / "again", Recipe.of("w8a8"))
    assert caught.value.what == f"model '{tmp_path / 'q'}' is quantised already"


def test_an_input_of_which_nothing_is_known(model: Path, tmp_path: Path) -> None:
    directory, recipe = ModelDirectory.open(model), Recipe.of("nvfp4")
    with CheckpointTensors(directory.weight_files()) as tensors:
        projections = select_projections(tensors, directory.config, recipe)
        with pytest.raises(QuantizationConfigError) as caught:
            write_quantised(directory, tensors, tmp_path / "q", recipe, projections)
    assert "nothing is known of the input of model.layers." in caught.value.what
    assert not list(tmp_path.iterdir())


def test_float16_is_quantised_like_float32(tmp_path: Path) -> None:
    half = save_odd(tmp_path / "half", dtype=torch.float16, tokenizer=False)
    config = ModelDirectory.open(half).config
    same = {name: tensor.float() for name, tensor in read(half).items()}
    save_checkpoint(tmp_path / "full", same, config)
    for name in ("half", "full"):
        write(tmp_path / name, tmp_path / f"{name}-q", Recipe.of("w4a16"))
    one, other = read(tmp_path / "half-q"), read(tmp_path / "full-q")
    assert all(torch.equal(tensor, other[name].to(tensor.dtype)) for name, tensor in one.items())
