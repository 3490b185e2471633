"""Every tensor of a GLM-4.x checkpoint is placed, declared as left out, or an error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fixtures.tiny_models import save_tiny

from mortise import LLM
from mortise.errors import MortiseError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

LAYERS = 2
EXTRA = ("eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head", "embed_tokens")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_tiny(
        tmp_path,
        model_type="glm4_moe",
        tokenizer=False,
        num_hidden_layers=LAYERS,
        num_nextn_predict_layers=1,
    )


def rewritten(directory: Path, tensors: Mapping[str, torch.Tensor], *without: str) -> Path:
    """The same directory with tensors added, and without some."""
    file = directory / "model.safetensors"
    kept = {name: one for name, one in load_file(file).items() if name not in without}
    save_file({**kept, **tensors}, file, metadata={"format": "pt"})
    return directory


def next_layer(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a multi-token prediction layer as published: a layer, and what is around."""
    last, after = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    for name, tensor in load_file(directory / "model.safetensors").items():
        if name.startswith(last):
            yield name.replace(last, after), tensor
    for name in EXTRA:
        yield f"{after}{name}.weight", torch.zeros(1)


def test_the_layer_that_drafts_is_left_out_by_name_and_with_a_reason(directory: Path) -> None:
    plain = LLM(model=directory)
    wanted = plain.logits(list(range(20)))
    assert not [one for one in plain.decisions if one.rule == "skip"]
    drafting = dict(next_layer(directory))
    with_draft = LLM(model=rewritten(directory, drafting))
    assert with_draft.logits(list(range(20))).equal(wanted)
    (skipped,) = [one for one in with_draft.decisions if one.rule == "skip"]
    assert skipped.value == f"{len(drafting)} tensors not loaded"
    assert skipped.reason == "multi-token prediction layer, read when drafting"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.self_attn.k_norm.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.experts.5.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "lm_head.weight",
    ],
)
def test_a_tensor_that_is_missing_is_named(directory: Path, name: str) -> None:
    with pytest.raises(WeightsError) as caught:
        LLM(model=rewritten(directory, {}, name))
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.1.mlp.experts.8.up_proj.weight",
        f"model.layers.{LAYERS + 1}.enorm.weight",
        "model.visual.weight",
    ],
)
def test_a_tensor_that_has_no_place_is_named(directory: Path, name: str) -> None:
    with pytest.raises(WeightsError) as caught:
        LLM(model=rewritten(directory, {name: torch.zeros(64)}))
    assert name in str(caught.value)


@pytest.mark.parametrize("field", ["attention_bias", "use_qk_norm"])
def test_a_configuration_that_knows_less_than_the_file_is_an_error(
    directory: Path, field: str
) -> None:
    config = directory / "config.json"
    said = config.read_text(encoding="utf-8")
    config.write_text(said.replace(f'"{field}": true', f'"{field}": false'), encoding="utf-8")
    with pytest.raises(MortiseError) as caught:
        LLM(model=directory)
    assert ".self_attn." in str(caught.value)
