from __future__ import annotations

import pytest
import torch

from mortise.backends import load_backend
from mortise.errors import ConfigError
from mortise.plugin import ExpertLayerRequest, WeightScheme
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
        ({"scheme_w13": WeightScheme.FP8_BLOCK}, "w13 is stored as fp8_block"),
        ({"scheme_w2": WeightScheme.W4A8}, "w2 is stored as w4a8"),
        ({"compute_dtype": torch.float16}, "the compute dtype is torch.float16"),
    ],
)
def test_it_says_which_layers_it_serves(changes: dict[str, object], reason: str) -> None:
    answer = load_backend("reference", role=ModelRole.MAIN).ops.supports(request(**changes))
    assert answer.ok is (not reason)
    assert answer.reason == reason
