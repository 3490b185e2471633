"""Drafts are stored as ``--draft-scheme`` says, and read back as they were stored."""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fixtures.compressed_models import unfuse_experts
from tests.fixtures.quantised_models import (
    NUM_LAYERS,
    ODD,
    expected_weights,
    read,
    save_odd,
    stored_weights,
    write,
)
from tests.fixtures.tiny_models import tiny_transformers_model

from mortise.checkpoint import CheckpointTensors, ModelDirectory, load_weights
from mortise.checkpoint.json_file import read_json_object
from mortise.checkpoint.placement import Skip
from mortise.checkpoint.quantization.plan import QuantizationPlan
from mortise.checkpoint.quantization.write.projections import Projection, select_projections
from mortise.checkpoint.quantization.write.recipe import DIALECTS, Recipe, Rule
from mortise.errors import QuantizationConfigError
from mortise.layers.stored_tensors import StoredTensors
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

NEXTN, MTP = f"model.layers.{NUM_LAYERS}.", "mtp.layers.0."

PAIRS: Final = [
    (dialect, scheme, draft)
    for dialect, schemes in DIALECTS.items()
    for scheme in schemes
    for draft in ("none", *schemes)
]


@pytest.fixture(scope="module")
def nextn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_odd(tmp_path_factory.mktemp("models") / "odd", tokenizer=False)


@pytest.fixture(scope="module")
def mtp(nextn: Path) -> Path:
    """The same layer under the names that Qwen's models have for it."""
    path = nextn.with_name("mtp")
    path.mkdir()
    tensors = {
        name.replace(f"{NEXTN}eh_proj", "mtp.fc").replace(NEXTN, MTP): tensor
        for name, tensor in load_file(nextn / "model.safetensors").items()
    }
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_bytes((nextn / "config.json").read_bytes())
    return path


def of_draft(projections: Mapping[str, Projection]) -> dict[str, Projection]:
    return {name: one for name, one in projections.items() if one.is_draft}


def assert_read_as_written(
    model: Path, written: Path, projections: dict[str, Projection]
) -> QuantizationPlan:
    """Every quantised module of the draft comes back bit for bit."""
    directory = ModelDirectory.open(written)
    memory, placements = {}, []
    with CheckpointTensors(directory.weight_files()) as tensors:
        main = QuantizationPlan.read(directory, tensors)
        main.check_names([])
        plan = QuantizationPlan.read_draft(directory, tensors, "auto")
        for module, projection in of_draft(projections).items():
            found, wanted = plan.common_scheme([module]), projection.scheme
            of_main = main.scheme(module)
            assert replace(found, reason=of_main.reason) == of_main, module
            assert (found.scheme, found.static_input) == (wanted.scheme, wanted.static_input)
            if projection.is_quantised:
                memory[module] = StoredTensors(
                    found, projection.out_features, projection.in_features, module=module
                )
                placements += plan.placements(module, memory[module].part(0), found)
        load_weights(tensors, placements, (*plan.skips(), Skip(".+", "not of this test")))
    expected = stored_weights(model, of_draft(projections))
    assert set(expected) == set(memory)
    for module, stored in expected.items():
        found = memory[module].record()
        assert torch.equal(found.weight.view(torch.uint8), stored.weight.view(torch.uint8)), module
        assert found.scale is not None and stored.scale is not None
        # Products with the input's scale are rounded on their way.
        torch.testing.assert_close(found.scale.float(), stored.scale.float(), rtol=3e-7, atol=0)
        assert (found.input_scale is None) == (stored.input_scale is None)
    return plan


@pytest.mark.parametrize(("dialect", "scheme", "draft"), PAIRS)
def test_every_dialect_stores_drafts(
    nextn: Path, tmp_path: Path, dialect: str, scheme: str, draft: str
) -> None:
    recipe = Recipe.of(scheme, dialect, draft_scheme=draft)
    projections = write(nextn, tmp_path / "q", recipe)
    plan = assert_read_as_written(nextn, tmp_path / "q", projections)
    # What the files say of the draft is the truth: nothing was decided against them.
    assert not plan.notable()
    quantised = {name for name, one in of_draft(projections).items() if one.is_quantised}
    assert bool(quantised) == (draft != "none")
    directory = ModelDirectory.open(tmp_path / "q")
    with CheckpointTensors(directory.weight_files()) as tensors:
        none = QuantizationPlan.read_draft(directory, tensors, "none")
        for module in of_draft(projections):
            if module not in quantised:
                assert none.scheme(module).reason == "draft.quantization is none"
                continue
            with pytest.raises(QuantizationConfigError) as caught:
                none.scheme(module)
            assert caught.value.what == (
                f"draft.quantization is none, and {len(quantised)} modules of"
                f" {NEXTN.removesuffix('.')} are stored quantised"
            )


@pytest.mark.parametrize("dialect", DIALECTS)
def test_layers_under_mtp_are_drafts_too(mtp: Path, tmp_path: Path, dialect: str) -> None:
    scheme = DIALECTS[dialect][0]
    projections = write(mtp, tmp_path / "q", Recipe.of(scheme, dialect, draft_scheme=scheme))
    assert_read_as_written(mtp, tmp_path / "q", projections)
    quantised = {one.kind for one in of_draft(projections).values() if one.is_quantised}
    assert "draft's mlp.experts.*.gate_proj" in quantised
    assert projections["mtp.fc"].scheme.reason == "outside the decoder layers"
    assert all(name.startswith(MTP) for name in of_draft(projections))


def test_experts_in_one_tensor_are_quantised_one_by_one(mtp: Path, tmp_path: Path) -> None:
    tensors = load_file(mtp / "model.safetensors")
    experts = f"{MTP}mlp.experts."
    gates, ups, downs = (
        torch.stack([tensors.pop(f"{experts}{n}.{leaf}_proj.weight") for n in range(4)])
        for leaf in ("gate", "up", "down")
    )
    fused = tmp_path / "fused"
    fused.mkdir()
    (fused / "config.json").write_bytes((mtp / "config.json").read_bytes())
    tensors[f"{experts}gate_up_proj"] = torch.cat([gates, ups], dim=1)
    tensors[f"{experts}down_proj"] = downs
    save_file(tensors, fused / "model.safetensors")
    recipe = Recipe.of("w8a8", draft_scheme="w4a16")
    write(fused, tmp_path / "q", recipe)
    write(mtp, tmp_path / "apart", recipe)
    found, expected = read(tmp_path / "q"), read(tmp_path / "apart")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_what_stays_float_in_a_draft_that_is_quantised(nextn: Path, tmp_path: Path) -> None:
    projections = write(nextn, tmp_path / "q", Recipe.of("w8a8", draft_scheme="w8a8"))
    left = {
        name.removeprefix(NEXTN): one.scheme.reason
        for name, one in of_draft(projections).items()
        if not one.is_quantised
    }
    assert left == {
        "eh_proj": "joins embedding and hidden state, outside the draft's block",
        "mlp.gate": "router",
        "self_attn.indexer.weights_proj": "weights of the indexer's heads, computed in float32",
    }


def test_exceptions_and_rules_reach_the_draft_that_is_quantised(
    nextn: Path, tmp_path: Path
) -> None:
    """Experts quantised, the rest not; the decoder in another scheme."""
    recipe = Recipe.of(
        "w8a8",
        draft_scheme="w4a16",
        ignore=[f"{NEXTN}self_attn.*", f"{NEXTN}mlp.shared_experts.*"],
        rules=[Rule(f"{NEXTN}mlp.experts.*.down_proj", "w4a8")],
    )
    projections = write(nextn, tmp_path / "q", recipe)
    assert_read_as_written(nextn, tmp_path / "q", projections)
    assert {one.kind: one.scheme.scheme.value for one in of_draft(projections).values()} == {
        "draft's eh_proj": "float",
        "draft's mlp.gate": "float",
        "draft's self_attn.q_a_proj": "float",
        "draft's self_attn.q_b_proj": "float",
        "draft's self_attn.kv_a_proj_with_mqa": "float",
        "draft's self_attn.kv_b_proj": "float",
        "draft's self_attn.o_proj": "float",
        "draft's self_attn.indexer.wq_b": "float",
        "draft's self_attn.indexer.wk": "float",
        "draft's self_attn.indexer.weights_proj": "float",
        "draft's mlp.shared_experts.gate_proj": "float",
        "draft's mlp.shared_experts.up_proj": "float",
        "draft's mlp.shared_experts.down_proj": "float",
        "draft's mlp.experts.*.gate_proj": "w4a16",
        "draft's mlp.experts.*.up_proj": "w4a16",
        "draft's mlp.experts.*.down_proj": "w4a8",
    }
    decoder = [one for one in projections.values() if not one.is_draft and one.is_quantised]
    assert {one.scheme.scheme for one in decoder} == {WeightScheme.W8A8}


def test_nothing_that_is_asked_for_others_reaches_a_draft_that_stays(nextn: Path) -> None:
    recipe = Recipe.of("w8a8", rules=[Rule("*.experts.*", "w4a16")])
    directory = ModelDirectory.open(nextn)
    with CheckpointTensors(directory.weight_files()) as tensors:
        found = select_projections(tensors, directory.config, recipe)
    drafts = [one for one in found if one.is_draft]
    assert {one.scheme.reason for one in drafts} == {"multi-token prediction layer"}


def failure(model: Path, recipe: Recipe) -> QuantizationConfigError:
    directory = ModelDirectory.open(model)
    with (
        CheckpointTensors(directory.weight_files()) as tensors,
        pytest.raises(QuantizationConfigError) as caught,
    ):
        select_projections(tensors, directory.config, recipe)
    assert caught.value.expected
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("recipe", "of_any", "of_draft"),
    [
        (Recipe.of("w8a8", draft_scheme="w8a8"), False, False),
        (Recipe.of("w8a8", draft_scheme="nvfp4"), True, True),
        (Recipe.of("w8a8-static", draft_scheme="w8a8"), True, False),
        (Recipe.of("nvfp4"), True, False),
        (Recipe.of("nvfp4", draft_scheme="nvfp4"), True, True),
        # A rule may mean projections of the draft, but for one that stays as it is.
        (Recipe.of("w4a16", rules=[Rule("*", "nvfp4")]), True, False),
        (Recipe.of("w4a16", draft_scheme="w4a16", rules=[Rule("*", "nvfp4")]), True, True),
    ],
)
def test_ranges_of_inputs_are_asked_for_where_they_are_needed(
    recipe: Recipe, of_any: bool, of_draft: bool
) -> None:
    assert recipe.needs_input_ranges == of_any
    assert recipe.needs_draft_input_ranges == of_draft


def test_a_draft_is_needed_where_one_is_to_be_quantised(nextn: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((nextn / "config.json").read_bytes())
    tensors = {
        name: tensor
        for name, tensor in load_file(nextn / "model.safetensors").items()
        if not name.startswith(NEXTN) or name.endswith("eh_proj.weight")
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert failure(tmp_path, Recipe.of("w8a8", draft_scheme="w8a8")).what == (
        "--draft-scheme is 'w8a8', and the model has no multi-token prediction layer"
    )


@pytest.mark.parametrize(
    ("scheme", "dialect", "draft", "what"),
    [
        ("fp8-block", None, "w8a8", "dialect fp8 cannot store scheme w8a8"),
        ("w8a8", None, "w4a4", "dialect compressed-tensors cannot store scheme w4a4"),
        ("nvfp4", "modelopt", "fp8-block", "dialect modelopt cannot store scheme fp8-block"),
        ("w8a8", "modelslim", "nvfp4", "dialect modelslim cannot store scheme nvfp4"),
        ("w8a8", None, "float", "--draft-scheme: 'float' is not known"),
    ],
)
def test_the_dialect_stores_both_schemes(
    scheme: str, dialect: str | None, draft: str, what: str
) -> None:
    with pytest.raises(QuantizationConfigError) as caught:
        Recipe.of(scheme, dialect, draft_scheme=draft)
    assert caught.value.what == what
    assert caught.value.expected


def test_groups_of_columns_are_the_drafts_too(nextn: Path, tmp_path: Path) -> None:
    recipe = Recipe.of("w8a8", draft_scheme="w4a16", group_size=32)
    projections = write(nextn, tmp_path / "q", recipe)
    assert_read_as_written(nextn, tmp_path / "q", projections)
    assert projections[f"{NEXTN}mlp.shared_experts.gate_proj"].scheme.group_size == 32


def library_model(section: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The library's model with the draft's block as one layer more, filled with every tensor."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = QuantizationConfig.model_validate(section)
    made = tiny_transformers_model(**ODD | {"num_hidden_layers": NUM_LAYERS + 1})
    made.model.layers[NUM_LAYERS].eh_proj = torch.nn.Linear(320, 160, bias=False)  # type: ignore[index, union-attr]
    unfuse_experts(made)
    apply_quantization_config(made, config, show_progress=False)
    ModelCompressor(quantization_config=config).compress_model(made)
    made.load_state_dict(tensors, strict=True, assign=True)
    return made


@pytest.mark.parametrize(
    ("scheme", "draft"),
    [("w8a8", "none"), ("w8a8", "w8a8"), ("w8a8", "w4a16"), ("w4a16", "nvfp4"), ("nvfp4", "nvfp4")],
)
def test_the_library_reads_the_same_draft(
    nextn: Path, tmp_path: Path, scheme: str, draft: str
) -> None:
    from compressed_tensors.compressors import ModelCompressor

    projections = write(nextn, tmp_path / "q", Recipe.of(scheme, draft_scheme=draft))
    section = ModelDirectory.open(tmp_path / "q").config["quantization_config"]
    theirs = library_model(section, read(tmp_path / "q"))
    schemes = {
        name: one.quantization_scheme
        for name, one in theirs.named_modules()
        if hasattr(one, "quantization_scheme")
    }
    expected = expected_weights(nextn, projections)
    assert set(schemes) == set(expected)
    assert any(name.startswith(NEXTN) for name in schemes) == (draft != "none")
    ModelCompressor().decompress_model(theirs)
    for module, weight in expected.items():
        found = theirs.get_submodule(module).weight
        if projections[module].scheme.scheme is WeightScheme.NVFP4:
            # The library multiplies in bfloat16, which has eight bits.
            torch.testing.assert_close(found.float(), weight, rtol=2**-7, atol=0)
        else:
            assert torch.equal(found, weight), module


def test_modelopt_excludes_what_is_left_of_the_draft(nextn: Path, tmp_path: Path) -> None:
    recipe = Recipe.of("nvfp4", "modelopt", draft_scheme="nvfp4", ignore=["*.kv_b_proj"])
    projections = write(nextn, tmp_path / "q", recipe)
    excluded = read_json_object(tmp_path / "q" / "hf_quant_config.json")["quantization"][
        "exclude_modules"
    ]
    left = {
        name
        for name in projections
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in excluded)
    }
    assert left == {name for name, one in projections.items() if not one.is_quantised}
    assert {f"{NEXTN}eh_proj", f"{NEXTN}self_attn.kv_b_proj"} < left
    assert f"{NEXTN}self_attn.o_proj.input_scale" in read(tmp_path / "q")


def test_modelslim_describes_every_tensor_of_the_draft(nextn: Path, tmp_path: Path) -> None:
    write(nextn, tmp_path / "q", Recipe.of("w8a8", "modelslim", draft_scheme="w4a4"))
    description = read_json_object(tmp_path / "q" / "quant_model_description.json")
    assert description[f"{NEXTN}eh_proj.weight"] == "FLOAT"
    assert description[f"{NEXTN}mlp.experts.3.up_proj.weight"] == "W4A4_DYNAMIC"
    assert description["model.layers.1.mlp.experts.3.up_proj.weight"] == "W8A8_DYNAMIC"
    assert set(read(tmp_path / "q")) < set(description)
