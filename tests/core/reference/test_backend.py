from __future__ import annotations

import pytest
import torch

from mortise.backends import load_backend
from mortise.errors import ConfigError
from mortise.plugin import ExpertLayerRequest, LinearLayerRequest, WeightScheme
from mortise.spec.roles import ModelRole


def test_it_runs_on_the_processor_unless_told_otherwise() -> None:
    capabilities = load_backend("reference", role=ModelRole.MAIN).ops.capabilities
    assert capabilities.device == torch.device("cpu")
    assert capabilities.num_workers == 4
    assert not capabilities.emulated


def test_it_runs_on_any_torch_device() -> None:
    bound = load_backend("reference", role=ModelRole.MAIN, device="meta")
    assert bound.ops.capabilities.device == torch.device("meta")


@pytest.mark.parametrize("device", ["emulated", "no such device"])
def test_a_device_that_torch_lacks(device: str) -> None:
    with pytest.raises(ConfigError, match=f"torch cannot use device '{device}'"):
        load_backend("reference", role=ModelRole.MAIN, device=device)


@pytest.mark.parametrize("value", [0, -1, True, "4", 2.0, None])
def test_num_workers_is_a_positive_number(value: object) -> None:
    with pytest.raises(ConfigError, match="num_workers"):
        load_backend("reference", role=ModelRole.MAIN, options={"num_workers": value})


def test_num_workers_is_an_option() -> None:
    bound = load_backend("reference", role=ModelRole.MAIN, options={"num_workers": 7})
    assert bound.ops.capabilities.num_workers == 7


def test_unknown_options_are_named() -> None:
    with pytest.raises(ConfigError, match="num_worker") as caught:
        load_backend("reference", role=ModelRole.MAIN, options={"num_worker": 7})
    assert caught.value.expected == "num_workers"


def request(**changes: object) -> ExpertLayerRequest:
    values: dict[str, object] = {
        "role": ModelRole.MAIN,
        "layer": "model.layers.1.mlp",
        "scheme_w13": WeightScheme.FLOAT,
        "scheme_w2": WeightScheme.FLOAT,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "hidden_size": 4,
        "intermediate_size": 4,
        "compute_dtype": torch.float32,
    }
    return ExpertLayerRequest(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"compute_dtype": torch.bfloat16}, ""),
        ({"compute_dtype": torch.float16}, "the compute dtype is torch.float16"),
        ({"scheme_w13": WeightScheme.FP8_BLOCK}, ""),
        ({"scheme_w13": WeightScheme.W8A8, "static_input": True}, ""),
        ({"scheme_w13": WeightScheme.W4A8}, "w13: a dimension of 4 cannot be divided into int32"),
        ({"scheme_w2": WeightScheme.NVFP4}, "w2: a dimension of 4 cannot be divided into blocks"),
        ({"scheme_w2": WeightScheme.NVFP4, "intermediate_size": 32}, ""),
        ({"static_input": True}, "w13: weights of scheme float are to have a static scale"),
        ({"num_groups_w2": 2}, "w2: weights of scheme float are to have scales for groups"),
        (
            {"scheme_w13": WeightScheme.W4A8, "hidden_size": 16, "num_groups_w13": 3},
            "w13: a dimension of 16 cannot be divided into groups of columns",
        ),
    ],
)
def test_it_says_which_layers_it_serves(changes: dict[str, object], reason: str) -> None:
    answer = load_backend("reference", role=ModelRole.MAIN).ops.supports(request(**changes))
    assert answer.ok is (not reason)
    assert answer.reason.startswith(reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"compute_dtype": torch.float16}, "the compute dtype is torch.float16"),
        ({"num_groups": 2}, ""),
        ({"num_groups": 5}, "a dimension of 32 cannot be divided into groups of columns"),
        ({"scheme": WeightScheme.W8A8, "static_input": True}, ""),
        ({"scheme": WeightScheme.NVFP4, "in_features": 24}, "a dimension of 24 cannot be divided"),
    ],
)
def test_it_says_which_projections_it_serves(changes: dict[str, object], reason: str) -> None:
    values: dict[str, object] = {
        "role": ModelRole.MAIN,
        "layer": "model.layers.0.mlp.down_proj",
        "scheme": WeightScheme.W4A16,
        "out_features": 4,
        "in_features": 32,
        "num_groups": 1,
        "static_input": False,
        "compute_dtype": torch.bfloat16,
    }
    asked = LinearLayerRequest(**{**values, **changes})  # type: ignore[arg-type]
    answer = load_backend("reference", role=ModelRole.MAIN).ops.supports_linear(asked)
    assert answer.ok is (not reason)
    assert answer.reason.startswith(reason)


def test_its_manifest_says_the_same() -> None:
    bound = load_backend("reference", role=ModelRole.MAIN)
    assert bound.row.manifest is not None
    assert bound.row.manifest.capabilities is not None
    stated, capabilities = bound.row.manifest.capabilities, bound.ops.capabilities
    assert set(stated.schemes) == capabilities.schemes
    assert set(stated.dispatch_dtypes) == capabilities.dispatch_dtypes
