from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from mortise.checkpoint import ModelDirectory, builtin_model_path
from mortise.checkpoint import directory as directory_module
from mortise.errors import ModelConfigError, ModelNotFoundError, MortiseError, WeightsError

if TYPE_CHECKING:
    from pathlib import Path


def model(path: Path, config: object = None, **files: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "x"} if config is None else config))
    for name, content in files.items():
        (path / name).write_text(content)
    return path


def error_of(kind: type[MortiseError], function: Any, *arguments: Any) -> list[str]:
    with pytest.raises(kind) as caught:
        function(*arguments)
    assert type(caught.value) is kind
    return str(caught.value).splitlines()


def test_open(tmp_path: Path) -> None:
    opened = ModelDirectory.open(model(tmp_path, {"model_type": "x", "eos_token_id": 3}))
    assert opened.path == tmp_path
    assert opened.config == {"model_type": "x", "eos_token_id": 3}
    assert opened.generation_config == {}


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    assert ModelDirectory.open("m").path == tmp_path / "m"


def test_missing_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = error_of(ModelNotFoundError, ModelDirectory.open, "owner/name")
    assert lines[:3] == [
        "model directory 'owner/name' does not exist",
        f"  looked for: {tmp_path}/owner/name",
        "  expected: a directory with config.json, *.safetensors and, for text, tokenizer.json",
    ]
    assert lines[3].startswith("  remedy: correct the path, or use 'builtin'")
    assert "hf download" in lines[3]


def test_a_file_instead_of_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    assert error_of(ModelNotFoundError, ModelDirectory.open, path) == [
        f"model '{path}' is a file",
        f"  file: {path}",
        "  expected: a directory with config.json, *.safetensors and, for text, tokenizer.json",
        f"  remedy: give the directory that holds the file: {tmp_path}",
    ]


def test_missing_config(tmp_path: Path) -> None:
    assert error_of(ModelNotFoundError, ModelDirectory.open, tmp_path) == [
        f"model directory '{tmp_path}' holds no config.json",
        f"  looked for: {tmp_path}/config.json",
        "  expected: a directory with config.json, *.safetensors and, for text, tokenizer.json",
        "  remedy: give the directory that was downloaded, not one above or below it",
    ]


def test_bad_json_in_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{\n  "hidden_size": 64,\n  "layers": }\n')
    assert error_of(ModelConfigError, ModelDirectory.open, tmp_path) == [
        "config.json is not valid JSON at line 3, column 13: Expecting value",
        f"  file: {tmp_path}/config.json",
        '  line 3: "layers": }',
        "  expected: a JSON object",
        (
            "  remedy: correct the file at that place, or download the file again from where the"
            " model was published"
        ),
    ]


def test_empty_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    lines = error_of(ModelConfigError, ModelDirectory.open, tmp_path)
    assert lines[0] == "config.json is not valid JSON at line 1, column 1: Expecting value"
    assert lines[1:3] == [f"  file: {tmp_path}/config.json", "  expected: a JSON object"]


def test_config_that_is_no_object(tmp_path: Path) -> None:
    lines = error_of(ModelConfigError, ModelDirectory.open, model(tmp_path, [1]))
    assert lines[0] == "config.json holds a JSON list"
    assert lines[2] == "  expected: a JSON object: { ... }"


def test_config_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    lines = error_of(ModelConfigError, ModelDirectory.open, tmp_path)
    assert lines[0] == "config.json is not UTF-8 text: byte 7 is not valid"
    assert lines[-1].startswith("  remedy: download the file again")


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("\ufeff{}", encoding="utf-8")
    assert ModelDirectory.open(tmp_path).config == {}


@pytest.mark.parametrize(
    ("config", "generation_config", "expected"),
    [
        ({}, None, ()),
        ({"eos_token_id": 1}, None, (1,)),
        ({"eos_token_id": 1}, {"eos_token_id": [2, 3]}, (2, 3)),
        ({"eos_token_id": 1}, {"eos_token_id": None}, (1,)),
    ],
)
def test_eos_token_ids(
    tmp_path: Path, config: object, generation_config: object, expected: tuple[int, ...]
) -> None:
    model(tmp_path, config)
    if generation_config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    assert ModelDirectory.open(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize("value", ["</s>", True, [1, "2"], 1.5])
def test_bad_eos_token_id(tmp_path: Path, value: object) -> None:
    opened = ModelDirectory.open(model(tmp_path, {"eos_token_id": value}))
    assert error_of(ModelConfigError, lambda: opened.eos_token_ids) == [
        f"eos_token_id in config.json is {value!r}",
        "  expected: an integer or a list of integers",
        "  remedy: correct config.json",
    ]


def indexed(path: Path, weight_map: object, *files: str) -> ModelDirectory:
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    model(path, **{"model.safetensors.index.json": index})
    for name in files:
        (path / name).touch()
    return ModelDirectory.open(path)


def test_a_single_file(tmp_path: Path) -> None:
    files = ModelDirectory.open(model(tmp_path, **{"model.safetensors": ""})).weight_files()
    assert files.paths == (tmp_path / "model.safetensors",)
    assert files.weight_map is None


def test_an_index(tmp_path: Path) -> None:
    weight_map = {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
    files = indexed(tmp_path, weight_map, "a.safetensors", "b.safetensors", "c.safetensors")
    assert files.weight_files().paths == (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert files.weight_files().weight_map == weight_map


def test_the_single_file_goes_before_the_index_as_in_transformers(tmp_path: Path) -> None:
    opened = indexed(tmp_path, {"x": "a.safetensors"}, "a.safetensors", "model.safetensors")
    assert opened.weight_files().paths == (tmp_path / "model.safetensors",)


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    opened = indexed(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"}, "a.safetensors")
    assert error_of(WeightsError, opened.weight_files) == [
        "1 of the 2 files that model.safetensors.index.json names is missing",
        f"  directory: {tmp_path}",
        "  missing: b.safetensors",
        "  expected: all 2 files beside the index",
        "  remedy: finish the download",
    ]


def test_many_missing_files_are_shortened(tmp_path: Path) -> None:
    opened = indexed(tmp_path, {f"t{i}": f"{i}.safetensors" for i in range(9)})
    lines = error_of(WeightsError, opened.weight_files)
    assert lines[0].endswith("are missing")
    assert lines[2].endswith("4.safetensors and 4 more")


@pytest.mark.parametrize(
    "weight_map",
    [None, [], {"x": 1}, {"x": "../a.safetensors"}, {"x": "/a"}, {"x": ""}, {"x": ".."}],
)
def test_an_unusable_index(tmp_path: Path, weight_map: object) -> None:
    opened = indexed(tmp_path / "m", weight_map)
    (tmp_path / "a.safetensors").touch()
    lines = error_of(ModelConfigError, opened.weight_files)
    assert lines[0] == "model.safetensors.index.json holds no usable weight_map"
    assert "same directory" in lines[2]


def test_no_weights(tmp_path: Path) -> None:
    opened = ModelDirectory.open(model(tmp_path))
    assert error_of(WeightsError, opened.weight_files) == [
        "the model directory holds no weights",
        f"  directory: {tmp_path}",
        "  expected: model.safetensors, or model.safetensors.index.json and the files it names",
        "  remedy: finish the download",
    ]


def test_shards_without_an_index(tmp_path: Path) -> None:
    opened = ModelDirectory.open(model(tmp_path, **{"model-00001-of-00002.safetensors": ""}))
    lines = error_of(WeightsError, opened.weight_files)
    assert "  found: model-00001-of-00002.safetensors" in lines
    assert lines[-1] == ("  remedy: finish the download; model.safetensors.index.json is missing")


@pytest.mark.parametrize(
    "name", ["quant_model_weights.safetensors", "quant_model_weight_w8a8.safetensors"]
)
def test_the_single_file_of_modelslim(tmp_path: Path, name: str) -> None:
    opened = ModelDirectory.open(model(tmp_path, **{name: ""}))
    files = opened.weight_files()
    assert files.paths == (tmp_path / name,)
    assert files.weight_map is None


def test_the_index_of_modelslim(tmp_path: Path) -> None:
    shards = [f"quant_model_weights-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = dict(zip("ab", shards, strict=True))
    index = json.dumps({"weight_map": weight_map})
    names = {**dict.fromkeys(shards, ""), "quant_model_weights.safetensors.index.json": index}
    files = ModelDirectory.open(model(tmp_path, **names)).weight_files()
    assert files.paths == tuple(tmp_path / shard for shard in shards)
    assert files.weight_map == weight_map
    (tmp_path / shards[1]).unlink()
    lines = error_of(WeightsError, ModelDirectory.open(tmp_path).weight_files)
    assert lines[0] == (
        "1 of the 2 files that quant_model_weights.safetensors.index.json names is missing"
    )


def test_modelslim_shards_without_their_index(tmp_path: Path) -> None:
    names = [f"quant_model_weights-0000{number}-of-00002.safetensors" for number in (1, 2)]
    opened = ModelDirectory.open(model(tmp_path, **dict.fromkeys(names, "")))
    lines = error_of(WeightsError, opened.weight_files)
    assert lines[0] == "the model directory holds no weights"
    assert lines[-1].endswith("quant_model_weights.safetensors.index.json is missing")


@pytest.mark.parametrize(
    "names",
    [
        ("model.safetensors", "quant_model_weights.safetensors"),
        ("model.safetensors.index.json", "quant_model_weights.safetensors.index.json"),
        ("quant_model_weight_w8a8.safetensors", "quant_model_weight_w4a8_dynamic.safetensors"),
    ],
)
def test_weights_of_two_models_in_one_directory(tmp_path: Path, names: tuple[str, str]) -> None:
    opened = ModelDirectory.open(model(tmp_path, **dict.fromkeys(names, "{}")))
    lines = error_of(WeightsError, opened.weight_files)
    assert lines[0].startswith("the model directory holds weights twice: ")
    assert all(name in lines[0] for name in names)


def test_pickled_weights(tmp_path: Path) -> None:
    opened = ModelDirectory.open(model(tmp_path, **{"pytorch_model.bin": ""}))
    assert error_of(WeightsError, opened.weight_files) == [
        "the model's weights are pickled torch files, which can run code when they are read",
        f"  directory: {tmp_path}",
        "  found: pytorch_model.bin",
        "  expected: model.safetensors, or model.safetensors.index.json and the files it names",
        (
            "  remedy: convert them: load the model with transformers and call"
            " save_pretrained(DIRECTORY), which writes safetensors"
        ),
    ]


def test_the_builtin_model_lies_inside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_module.importlib.resources, "files", lambda package: tmp_path)
    lines = error_of(ModelNotFoundError, builtin_model_path)
    assert lines[:2] == [
        "the built-in model is not part of this installation",
        f"  looked for: {tmp_path}/assets/stdlib-10m",
    ]
    assert lines[-1].startswith("  remedy: install mortise-core again")
    (tmp_path / "assets").mkdir()
    model(tmp_path / "assets" / "stdlib-10m", {"model_type": "builtin"})
    assert ModelDirectory.open("builtin").config == {"model_type": "builtin"}


def test_a_directory_called_builtin_needs_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "builtin", {"model_type": "own"})
    assert ModelDirectory.open("./builtin").config == {"model_type": "own"}
