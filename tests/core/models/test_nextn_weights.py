"""Every tensor of a NextN layer is placed, declared as left out, or an error that names it."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from tests.fixtures.nextn_models import TransformersNextN, load_draft, rewrite
from tests.fixtures.paged_models import PagedModel, reference_context

from mortise.errors import (
    MissingTensorError,
    ModelConfigError,
    TensorMismatchError,
    UnexpectedTensorError,
)
from mortise.models.registry import family_of
from mortise.parallel.group import ExpertParallelGroup

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = 2
LAYER = f"model.layers.{LAYERS}."
FAMILIES = ("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe")


@pytest.fixture(params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return TransformersNextN(request.param, num_hidden_layers=LAYERS).save(tmp_path)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def edit_config(directory: Path, **fields: object) -> dict[str, object]:
    file = directory / "config.json"
    config: dict[str, object] = json.loads(file.read_text(encoding="utf-8")) | fields
    file.write_text(json.dumps(config), encoding="utf-8")
    return config


def reasons(directory: Path, group: ExpertParallelGroup | None = None) -> Counter[str]:
    """How many tensors are left out for which reason."""
    main = PagedModel(directory).model
    return Counter(load_draft(directory, main, group)[1].skipped.values())


def test_the_layer_is_all_that_is_read(directory: Path) -> None:
    _, report = load_draft(directory, PagedModel(directory).model)
    names = stored(directory)
    assert set(report.placed) == {name for name in names if name.startswith(LAYER)}
    assert report.skipped == dict.fromkeys(names.keys() - {*report.placed}, "the main model's")
    assert report.absent == (f"{LAYER}embed_tokens.weight", f"{LAYER}shared_head.head.weight")


@pytest.mark.parametrize(
    "part",
    [
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "shared_head.norm.weight",
        "input_layernorm.weight",
        "self_attn.o_proj.weight",
        "mlp.gate.e_score_correction_bias",
        "mlp.experts.5.up_proj.weight",
        "mlp.shared_experts.down_proj.weight",
    ],
)
def test_a_tensor_that_is_missing_is_named(directory: Path, part: str) -> None:
    rewrite(directory, {}, LAYER + part)
    with pytest.raises(MissingTensorError, match="1 tensor") as caught:
        reasons(directory)
    assert LAYER + part in str(caught.value)


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_the_layer_needs_an_indexer_of_its_own(model_type: str, tmp_path: Path) -> None:
    TransformersNextN(model_type, num_hidden_layers=LAYERS).save(tmp_path)
    rewrite(tmp_path, {}, f"{LAYER}self_attn.indexer.wk.weight")
    with pytest.raises(MissingTensorError, match=r"self_attn\.indexer\.wk"):
        reasons(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}mlp.experts.8.up_proj.weight",
        f"{LAYER}self_attn.rotary_emb.cos",
        f"{LAYER}eh_proj.bias",
        f"{LAYER}norm.weight",
        f"model.layers.{LAYERS + 1}.enorm.weight",
        f"model.layers.{LAYERS}0.enorm.weight",
    ],
)
def test_a_tensor_that_nobody_knows_is_named(directory: Path, name: str) -> None:
    main = PagedModel(directory).model
    rewrite(directory, {name: torch.zeros(64, 64)})
    with pytest.raises(UnexpectedTensorError) as caught:
        load_draft(directory, main)
    assert name in str(caught.value)


def test_what_is_left_out_has_a_reason(directory: Path) -> None:
    edit_config(directory, num_nextn_predict_layers=3)
    first = [name for name in stored(directory) if name.startswith(LAYER)]
    further = {
        name.replace(LAYER, f"model.layers.{LAYERS + more}."): torch.zeros(1)
        for name in first
        for more in (1, 2)
    }
    rewrite(directory, {**further, f"{LAYER}self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    found = reasons(directory)
    assert found.keys() == {
        "the main model's",
        "only the first multi-token prediction layer drafts",
        "computed from the configuration",
    }
    assert found["only the first multi-token prediction layer drafts"] == 2 * len(first)
    assert found["computed from the configuration"] == 1


def test_embedding_and_head_stored_once_more(directory: Path) -> None:
    tensors = stored(directory)
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    copies = {f"{LAYER}embed_tokens.weight": embedding, f"{LAYER}shared_head.head.weight": head}
    rewrite(directory, copies)
    main = PagedModel(directory).model
    _, report = load_draft(directory, main)
    assert copies.keys() <= {*report.placed}
    assert not report.absent
    assert main.model.embed_tokens.weight.equal(embedding)
    assert main.lm_head is not None
    assert main.lm_head.weight.equal(head)


@pytest.mark.parametrize("part", ["embed_tokens", "shared_head.head"])
def test_another_embedding_or_head_is_refused(directory: Path, part: str) -> None:
    other = stored(directory)["lm_head.weight"].clone()
    other[3, 5] += 1
    rewrite(directory, {f"{LAYER}{part}.weight": other})
    with pytest.raises(TensorMismatchError, match="differs from the main model's") as caught:
        reasons(directory)
    assert f"{LAYER}{part}.weight" in str(caught.value)


def test_an_embedding_of_another_size_is_refused(directory: Path) -> None:
    rewrite(directory, {f"{LAYER}embed_tokens.weight": torch.zeros(100, 64)})
    with pytest.raises(TensorMismatchError, match=r"\[100, 64\]"):
        reasons(directory)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_the_head_of_a_tied_model_is_its_embedding(model_type: str, tmp_path: Path) -> None:
    tied = TransformersNextN(model_type, num_hidden_layers=LAYERS, tie_word_embeddings=True)
    tied.save(tmp_path)
    head, embedding = (
        f"{LAYER}shared_head.head.weight",
        stored(tmp_path)["model.embed_tokens.weight"],
    )
    rewrite(tmp_path, {head: embedding})
    assert reasons(tmp_path) == {
        "the main model's": len(stored(tmp_path)) - 1 - len(tied.tensors())
    }
    rewrite(tmp_path, {head: embedding + 1})
    with pytest.raises(TensorMismatchError, match="differs from the main model's head"):
        reasons(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_of_two_ranks_reads_its_own_experts(directory: Path, rank: int) -> None:
    tensors, main = stored(directory), PagedModel(directory).model
    draft, report = load_draft(directory, main, ExpertParallelGroup(rank=rank, world_size=2))
    prefix = f"{LAYER}mlp.experts."
    read = {
        int(name.removeprefix(prefix).split(".")[0]) for name in report.placed if prefix in name
    }
    assert read == set(range(4 * rank, 4 * rank + 4))
    others = {name for name, why in report.skipped.items() if why == "experts of other ranks"}
    assert len(others) == 4 * 3
    assert all(name.startswith(prefix) for name in others)
    assert {*report.placed, *others} == {name for name in tensors if name.startswith(LAYER)}
    down = [tensors[f"{prefix}{expert}.down_proj.weight"] for expert in sorted(read)]
    (held,) = [
        one for name, one in draft.named_parameters() if one.shape == torch.stack(down).shape
    ]
    assert held.equal(torch.stack(down))


def test_a_model_without_the_layer_says_what_to_do(directory: Path) -> None:
    config = edit_config(directory, num_nextn_predict_layers=0)
    with pytest.raises(ModelConfigError, match="has no multi-token prediction layer") as caught:
        family_of(config).build_draft(config, reference_context())
    assert "--draft" in str(caught.value)


def test_a_layer_that_config_json_does_not_count_is_no_draft(directory: Path) -> None:
    config = edit_config(directory)
    del config["num_nextn_predict_layers"]
    with pytest.raises(ModelConfigError, match="num_nextn_predict_layers"):
        family_of(config).build_draft(config, reference_context())


@pytest.mark.parametrize("rank", [0, 1])
def test_an_expert_that_no_rank_has_is_named(directory: Path, rank: int) -> None:
    name = f"{LAYER}mlp.experts.8.up_proj.weight"
    main = PagedModel(directory).model
    rewrite(directory, {name: torch.zeros(32, 64)})
    with pytest.raises(UnexpectedTensorError) as caught:
        load_draft(directory, main, ExpertParallelGroup(rank=rank, world_size=2))
    assert name in str(caught.value)


def test_what_is_decided_has_the_names_of_the_checkpoint(directory: Path) -> None:
    draft, _ = load_draft(directory, PagedModel(directory).model)
    assert draft.finish_loading().keys() == {f"{LAYER}mlp"}
