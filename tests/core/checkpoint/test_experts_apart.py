"""A tensor of all experts is named and read as one tensor for each projection of each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mortise.checkpoint import CheckpointTensors, WeightFiles
from mortise.errors import MissingTensorError, WeightsError

if TYPE_CHECKING:
    from pathlib import Path

EXPERTS = "model.layers.3.mlp.experts"


def opened(path: Path, **tensors: torch.Tensor) -> CheckpointTensors:
    file = path / "model.safetensors"
    save_file(tensors, file)
    return CheckpointTensors(WeightFiles(paths=(file,), weight_map=None))


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@given(
    num_experts=st.integers(1, 4),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    name=st.sampled_from([EXPERTS, "mtp.layers.0.mlp.experts", "experts"]),
)
@settings(max_examples=20, deadline=None)
def test_names_order_and_values(
    tmp_path_factory: pytest.TempPathFactory, num_experts: int, rows: int, columns: int, name: str
) -> None:
    both, down = numbered(num_experts, 2 * rows, columns), numbered(num_experts, columns, rows)
    tensors = opened(
        tmp_path_factory.mktemp("model"),
        **{f"{name}.gate_up_proj": both, f"{name}.down_proj": down},
    )
    parts = {
        f"{name}.{expert}.{projection}.weight": values
        for expert in range(num_experts)
        for projection, values in (
            ("gate_proj", both[expert, :rows]),
            ("up_proj", both[expert, rows:]),
            ("down_proj", down[expert]),
        )
    }
    assert set(tensors.names()) == set(parts)
    for part, values in parts.items():
        assert torch.equal(tensors.read(part), values)
        assert tensors.shape(part) == values.shape
        assert tensors.stored(part).nbytes == values.nbytes
    assert f"{name}.gate_up_proj" not in tensors
    # In the order of the data: expert by expert, gate before up.
    of_both = [one for one in tensors.names() if not one.endswith("down_proj.weight")]
    assert of_both == [one for one in parts if not one.endswith("down_proj.weight")]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.3.mlp.gate_up_proj", (2, 4, 3)),
        ("model.layers.3.mlp.shared_experts.gate_up_proj", (2, 4, 3)),
        (f"{EXPERTS}.gate_up_proj_scale_inv", (2, 4, 3)),
        (f"{EXPERTS}.gate_up_proj.weight", (2, 4, 3)),
        (f"{EXPERTS}.gate_up_proj", (4, 3)),
        (f"{EXPERTS}.gate_up_proj", (2, 5, 3)),
        (f"{EXPERTS}.0.down_proj.weight", (2, 4, 3)),
    ],
)
def test_what_is_no_tensor_of_all_experts(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    tensors = opened(tmp_path, **{name: numbered(*shape)})
    assert list(tensors.names()) == [name]
    assert torch.equal(tensors.read(name), numbered(*shape))


def test_a_projection_in_both_forms(tmp_path: Path) -> None:
    alone = {f"{EXPERTS}.1.down_proj.weight": numbered(4, 3)}
    with pytest.raises(WeightsError, match=r"experts\.1\.down_proj\.weight' is stored twice"):
        opened(tmp_path, **{f"{EXPERTS}.down_proj": numbered(2, 4, 3)}, **alone)
    further = {f"{EXPERTS}.2.down_proj.weight": numbered(4, 3)}
    names = opened(tmp_path, **{f"{EXPERTS}.down_proj": numbered(2, 4, 3)}, **further).names()
    assert sorted(names) == [f"{EXPERTS}.{number}.down_proj.weight" for number in range(3)]


def test_the_index_names_what_is_in_the_files(tmp_path: Path) -> None:
    file, name = tmp_path / "model.safetensors", f"{EXPERTS}.down_proj"
    save_file({name: numbered(2, 4, 3)}, file)
    files = WeightFiles(paths=(file,), weight_map={name: file.name})
    assert len(CheckpointTensors(files)) == 2
    wrong = WeightFiles(paths=(file,), weight_map={f"{EXPERTS}.0.down_proj.weight": file.name})
    with pytest.raises(MissingTensorError, match="does not hold"):
        CheckpointTensors(wrong)
