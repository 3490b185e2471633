"""Memory for stored weights: parts and experts are views, and what cannot be stored says where."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mortise.checkpoint.quantization.module_scheme import ModuleScheme
from mortise.errors import QuantizationConfigError
from mortise.layers.stored_tensors import StoredTensors
from mortise.spec.weights import WeightScheme

QUANTISED = sorted(set(WeightScheme) - {WeightScheme.FLOAT})


def made(scheme: WeightScheme, **options: int) -> StoredTensors:
    static = scheme is WeightScheme.NVFP4
    stored = ModuleScheme(scheme=scheme, static_input=static, dialect="made up")
    return StoredTensors(stored, 2 * 160, 256, num_parts=2, module="mlp.gate_proj", **options)


@pytest.mark.parametrize("scheme", QUANTISED)
def test_parts_of_experts_are_views_that_cover_everything(scheme: WeightScheme) -> None:
    tensors = made(scheme, num_experts=3)
    whole = tensors.record()
    names = [name for name, _ in tensors.named_buffers()]
    for name in names:
        getattr(whole, name).view(torch.uint8).zero_()
    for expert in range(3):
        for number in range(2):
            part = tensors.part(number, expert)
            assert part.num_parts == 1
            for name in names:
                view = getattr(part, name)
                assert view.view(torch.uint8).sum() == 0, "two parts share memory"
                view.view(torch.uint8).fill_(1)
    assert all(bool((getattr(whole, name).view(torch.uint8) == 1).all()) for name in names)


def test_an_unquantised_weight_is_a_parameter_and_others_keep_their_dtype() -> None:
    assert isinstance(made(WeightScheme.FLOAT).weight, nn.Parameter)
    for scheme in QUANTISED:
        assert not list(made(scheme).parameters())


def test_sizes_that_a_scheme_cannot_store_name_the_module_and_why_it_is_stored_so() -> None:
    stored = ModuleScheme(scheme=WeightScheme.W4A16, reason="group_0 says w4a16")
    with pytest.raises(QuantizationConfigError, match=r"^module mlp\.down_proj: ") as raised:
        StoredTensors(stored, 8, 12, module="mlp.down_proj")
    assert raised.value.details == ("stored as w4a16: group_0 says w4a16",)
