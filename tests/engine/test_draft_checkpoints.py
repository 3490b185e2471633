"""A checkpoint whose draft is not whole is one clear error, and no weight is dropped in silence."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from mortise import SamplingParams
from mortise.errors import (
    MissingTensorError,
    ModelConfigError,
    QuantizationConfigError,
    TensorMismatchError,
    UnexpectedTensorError,
)
from mortise.spec.roles import ModelRole
from tests.cli.command_line import failure, mortise
from tests.fixtures.drafted_models import draft_prefixes, drafting, save_drafted
from tests.fixtures.tiny_models import save_tiny

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mortise.backends import Decision
    from mortise.errors import MortiseError

FAMILIES = ("deepseek_v32", "glm4_moe", "qwen3_next", "qwen3_5_moe_text")


class Checkpoints(NamedTuple):
    """A model with a draft, quantised copies of it, and what the draft's tensors are called."""

    plain: Path
    with_draft: Path
    without_draft: Path
    every: str
    layer: str


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoints(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoints:
    folder = tmp_path_factory.mktemp("checkpoints")
    plain = save_drafted(folder / "plain", model_type=request.param)
    for name, scheme in (("with_draft", "w8a8"), ("without_draft", "none")):
        schemes = ("--scheme", "w8a8", "--draft-scheme", scheme)
        outcome = mortise("quantize", folder / name, "--model", plain, *schemes)
        assert outcome.code == 0, outcome.stderr
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    return Checkpoints(
        plain, folder / "with_draft", folder / "without_draft", *draft_prefixes(config)
    )


def changed(model: Path, folder: Path, tensors: Mapping[str, torch.Tensor | None]) -> Path:
    """A copy with some tensors added or replaced, and those that are None left out."""
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    before = load_file(model / "model.safetensors")
    assert all(tensor is not None or name in before for name, tensor in tensors.items())
    stored = {**before, **tensors}
    kept = {name: tensor for name, tensor in stored.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refused(path: Path, kind: type[MortiseError], *words: str, quantization: str = "auto") -> None:
    """Python and the command line say the same, once, and name what is wrong."""
    with pytest.raises(kind) as caught:
        drafting(path, 1, draft={"quantization": quantization})
    message = failure(
        "generate", "a", "--model", path, "--dtype", "float32",
        *("--draft", "1", "--draft-quantization", quantization),
    )  # fmt: skip
    for word in words:
        assert word in str(caught.value)
        assert word in message
    assert caught.value.remedy
    assert message.count("error: ") == 1


def drafts(path: Path) -> list[Decision]:
    """The decisions of a model whose draft loads, which then drafts; the draft's alone."""
    llm = drafting(path, 2)
    (done,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=5, ignore_eos=True))
    assert done.drafting is not None
    assert done.drafting.drafted > 0
    assert llm.loaded.draft is not None
    return [one for one in llm.decisions if one.role is ModelRole.DRAFT]


@pytest.mark.parametrize(
    "part",
    ["self_attn.o_proj.weight", "input_layernorm.weight", "mlp.experts.3.up_proj.weight"],
)
def test_a_missing_tensor_of_the_layer(checkpoints: Checkpoints, part: str, tmp_path: Path) -> None:
    name = checkpoints.layer + part
    refused(changed(checkpoints.plain, tmp_path, {name: None}), MissingTensorError, name)


def test_a_missing_projection_of_the_layers_input(checkpoints: Checkpoints, tmp_path: Path) -> None:
    name = f"{checkpoints.every}{'fc' if checkpoints.every == 'mtp.' else 'eh_proj'}.weight"
    refused(changed(checkpoints.plain, tmp_path, {name: None}), MissingTensorError, name)


@pytest.mark.parametrize("part", ["self_attn.q_proj2.weight", "mlp.experts.99.up_proj.weight"])
def test_a_tensor_too_many(checkpoints: Checkpoints, part: str, tmp_path: Path) -> None:
    name = checkpoints.layer + part
    path = changed(checkpoints.plain, tmp_path, {name: torch.ones(2, 2)})
    refused(path, UnexpectedTensorError, name)


def test_a_tensor_of_another_shape(checkpoints: Checkpoints, tmp_path: Path) -> None:
    name = f"{checkpoints.layer}input_layernorm.weight"
    path = changed(checkpoints.plain, tmp_path, {name: torch.ones(3)})
    refused(path, TensorMismatchError, name)


def test_an_embedding_of_its_own(checkpoints: Checkpoints, tmp_path: Path) -> None:
    name = f"{checkpoints.every}embed_tokens.weight"
    embedding = load_file(checkpoints.plain / "model.safetensors")["model.embed_tokens.weight"]
    path = changed(checkpoints.plain, tmp_path, {name: embedding + 1})
    refused(path, TensorMismatchError, name, "embedding")


def test_quantised_where_the_user_says_that_nothing_is(checkpoints: Checkpoints) -> None:
    first = checkpoints.layer.removesuffix(".")
    refused(
        checkpoints.with_draft,
        QuantizationConfigError,
        "draft.quantization is none",
        first,
        quantization="none",
    )


def test_scales_that_are_missing(checkpoints: Checkpoints, tmp_path: Path) -> None:
    name = f"{checkpoints.layer}self_attn.o_proj.weight_scale"
    path = changed(checkpoints.with_draft, tmp_path, {name: None})
    refused(path, QuantizationConfigError, name)


def test_scales_that_are_missing_of_one_expert(checkpoints: Checkpoints, tmp_path: Path) -> None:
    name = f"{checkpoints.layer}mlp.experts.1.down_proj.weight_scale"
    path = changed(checkpoints.with_draft, tmp_path, {name: None})
    refused(path, QuantizationConfigError, name)


def test_no_tensor_of_the_layer_at_all(checkpoints: Checkpoints, tmp_path: Path) -> None:
    stored = load_file(checkpoints.plain / "model.safetensors")
    none = {name: None for name in stored if name.startswith(checkpoints.every)}
    assert none
    path = changed(checkpoints.plain, tmp_path, none)
    refused(path, ModelConfigError, "multi-token prediction layer", "--draft")


def test_a_model_that_never_had_the_layer(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", num_nextn_predict_layers=0)
    refused(path, ModelConfigError, "multi-token prediction layer", "--draft")


def test_what_is_in_order_loads_and_tells_how(checkpoints: Checkpoints) -> None:
    """As its tensors are, whatever the configuration says of the main model."""
    for path, projections, travel in (
        (checkpoints.plain, set(), "fp32"),
        (checkpoints.without_draft, set(), "fp32"),
        (checkpoints.with_draft, {"w8a8"}, "int8"),
    ):
        decisions = drafts(path)
        stored = [one.value for one in decisions if " projections " in one.value]
        assert {value.split()[-1] for value in stored} == projections
        (experts,) = [one for one in decisions if one.subject == f"{checkpoints.layer}mlp"]
        assert experts.value.startswith(f"{travel}, ")


def test_none_is_said_of_a_draft_that_has_none(checkpoints: Checkpoints) -> None:
    for path in (checkpoints.plain, checkpoints.without_draft):
        llm = drafting(path, 1, draft={"quantization": "none"})
        assert llm.loaded.draft is not None


def test_explain_tells_what_the_draft_leaves_and_why(checkpoints: Checkpoints) -> None:
    outcome = mortise(
        "explain", "--model", checkpoints.without_draft, "--draft", "1", "--dtype", "float32",
        "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    told = json.dumps(outcome.document)
    assert "the main model's" in told
    (weights,) = [one for one in drafts(checkpoints.without_draft) if one.rule == "skip"]
    stored = load_file(checkpoints.without_draft / "model.safetensors")
    left = [name for name in stored if not name.startswith(checkpoints.every)]
    assert weights.value == f"{len(left)} tensors not loaded"
