from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from mortise.checkpoint import CheckpointTensors, WeightFiles
from mortise.checkpoint import tensors as tensors_module
from mortise.errors import CorruptFileError, MissingTensorError, MortiseError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def files(*paths: Path, weight_map: Mapping[str, str] | None = None) -> WeightFiles:
    return WeightFiles(paths=paths, weight_map=weight_map)


def error_of(kind: type[MortiseError], weight_files: WeightFiles) -> list[str]:
    with pytest.raises(kind) as caught:
        CheckpointTensors(weight_files)
    assert type(caught.value) is kind
    return str(caught.value).splitlines()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7, dtype=torch.int8)}, path)
    return path


def test_names_shapes_dtypes_and_data(path: Path) -> None:
    with CheckpointTensors(files(path)) as tensors:
        assert set(tensors.names()) == {"a", "b"}
        assert len(tensors) == 2
        assert "a" in tensors
        assert "c" not in tensors
        assert tensors.shape("a") == (2, 3)
        assert tensors.shape("b") == ()
        assert tensors.dtype("a") == torch.float32
        assert tensors.dtype("b") == torch.int8
        assert tensors.stored("a").nbytes == 24
        assert tensors.stored("a").path == path
        assert torch.equal(tensors.read("a"), torch.arange(6.0).reshape(2, 3))
        assert tensors.read("b").item() == 7


def test_several_files_and_reading_back_and_forth(tmp_path: Path) -> None:
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_file({"a": torch.zeros(2)}, first)
    save_file({"b": torch.ones(3), "c": torch.full((1,), 2.0)}, second)
    weight_map = {"a": first.name, "b": second.name, "c": second.name}
    tensors = CheckpointTensors(files(first, second, weight_map=weight_map))
    assert next(iter(tensors.names())) == "a"
    assert [tensors.read(name).sum().item() for name in "abcab"] == [0, 3, 2, 0, 3]
    tensors.close()
    assert tensors.read("b").sum().item() == 3


@pytest.mark.parametrize("dtype", tensors_module.DTYPES.values(), ids=str)
def test_every_dtype_is_what_torch_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4, dtype=torch.uint8).to(torch.float32).to(dtype)}, path)
    tensors = CheckpointTensors(files(path))
    assert tensors.dtype("a") == dtype == tensors.read("a").dtype
    assert tensors.stored("a").nbytes == tensors.read("a").nbytes


def test_names_come_in_the_order_of_the_data(path: Path) -> None:
    tensors = CheckpointTensors(files(path))
    addresses = [tensors.read(name).data_ptr() for name in tensors.names()]
    assert addresses == sorted(addresses)


def test_a_mapping_is_made_anew_after_enough_bytes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, calls = tensors_module.opened, []
    monkeypatch.setattr(
        tensors_module, "opened", lambda path: (calls.append(path), opened(path))[1]
    )
    tensors = CheckpointTensors(files(path))
    assert len(calls) == 1, "the header"
    tensors.read("a")
    tensors.read("a")
    assert len(calls) == 2
    monkeypatch.setattr(tensors_module, "MAPPED_BYTES_LIMIT", 48)
    assert torch.equal(tensors.read("a"), torch.arange(6.0).reshape(2, 3))
    assert len(calls) == 3
    tensors.read("a")
    tensors.read("a")
    assert len(calls) == 4


def test_a_truncated_file(path: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-5])
    lines = error_of(CorruptFileError, files(path))
    assert lines[:4] == [
        "model.safetensors is truncated",
        f"  file: {path}",
        f"  size found: {size - 5} bytes",
        f"  size needed: {size} bytes",
    ]
    assert lines[4].startswith("  safetensors says: ")
    assert lines[5:] == [
        "  expected: a complete safetensors file",
        "  remedy: download the file again and compare its size and checksum with the publisher's",
    ]


def test_a_file_truncated_inside_its_header(path: Path) -> None:
    (header_length,) = struct.unpack("<Q", path.read_bytes()[:8])
    path.write_bytes(path.read_bytes()[:20])
    lines = error_of(CorruptFileError, files(path))
    assert lines[0] == "model.safetensors is truncated"
    assert lines[2:4] == [
        "  size found: 20 bytes",
        f"  size needed: {8 + header_length} bytes",
    ]


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"<html>not found</html>" * 9, b"\x20" + b"\0" * 7 + b"[" * 32, b"\0" * 100],
    ids=["empty", "short", "html", "header that is no JSON", "zeros"],
)
def test_garbage(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    lines = error_of(CorruptFileError, files(path))
    assert lines[0] == "model.safetensors is not a safetensors file"
    assert lines[2] == f"  size found: {len(content)} bytes"
    assert lines[3] == "  size needed: unknown, its header cannot be read"


def test_a_pointer_of_git_lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    lines = error_of(CorruptFileError, files(path))
    assert lines[0] == "model.safetensors is a Git LFS pointer, not the file it stands for"
    assert lines[-1] == "  remedy: fetch the file itself: git lfs pull"


def test_bytes_behind_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")
    lines = error_of(CorruptFileError, files(path))
    assert lines[0] == "model.safetensors does not agree with its own header"


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "X", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32"},
        "text",
    ],
)
def test_a_wrong_header(path: Path, entry: object) -> None:
    header = json.dumps({"a": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    lines = error_of(CorruptFileError, files(path))
    assert f"  file: {path}" in lines
    assert lines[-1].startswith("  remedy: download the file again")


def test_a_dtype_that_is_not_known(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 2)
    lines = error_of(WeightsError, files(path))
    assert lines[:2] == ["tensor 'a' is stored as F4", f"  file: {path}"]
    assert lines[2].startswith("  expected: one of BOOL, U8,")
    assert lines[3] == "  remedy: use a version of the model in one of these formats"


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    lines = error_of(WeightsError, files(tmp_path / "none.safetensors"))
    assert lines[0].startswith("none.safetensors cannot be read: ")


def test_an_index_that_promises_too_much(path: Path) -> None:
    weight_map = {"a": path.name, "b": path.name, "c": path.name}
    assert error_of(MissingTensorError, files(path, weight_map=weight_map)) == [
        "the index names a tensor that its file does not hold",
        "  c: not in model.safetensors",
        (
            "  expected: model.safetensors.index.json and the safetensors files of one and the same"
            " model"
        ),
        "  remedy: download the model again into an empty directory",
    ]


def test_an_index_that_names_the_wrong_file(path: Path) -> None:
    weight_map = {name: f"other-{number}" for number, name in enumerate("ab" * 1)}
    lines = error_of(MissingTensorError, files(path, weight_map=weight_map))
    assert lines[0] == "the index names 2 tensors that its files do not hold"
    assert lines[1:3] == ["  a: not in other-0", "  b: not in other-1"]


def test_a_long_list_of_broken_promises_is_shortened(path: Path) -> None:
    weight_map = {f"t{number}": path.name for number in range(13)}
    lines = error_of(MissingTensorError, files(path, weight_map=weight_map))
    assert lines[11] == "  and 3 more"


def test_a_tensor_stored_twice(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    assert error_of(WeightsError, files(path, other)) == [
        "tensor 'a' is stored twice",
        f"  first: {path}",
        f"  second: {other}",
        "  expected: every tensor in one file",
        (
            "  remedy: remove the file that does not belong to this model, or download the model"
            " into an empty directory"
        ),
    ]
