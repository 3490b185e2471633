"""Float8 blocks are judged by transformers, and by blocks multiplied out one by one in numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from tests.fixtures.quantised_models import expected_weights, read, save_odd, unfused, write
from tests.fixtures.tiny_models import save_tiny

from mortise.checkpoint import ModelDirectory
from mortise.checkpoint.quantization.write.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_odd(tmp_path_factory.mktemp("models") / "odd")


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_values_times_the_scale_of_their_block(
    model: Path, tmp_path: Path, powers_of_two: bool
) -> None:
    projections = write(model, tmp_path / "q", Recipe.of("fp8-block", powers_of_two=powers_of_two))
    written = read(tmp_path / "q")
    expected = expected_weights(model, projections)
    assert expected
    for module, weight in expected.items():
        values, scale = written[f"{module}.weight"], written[f"{module}.weight_scale_inv"]
        assert (values.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
        product = values.float().numpy()
        for row, column in np.ndindex(*scale.shape):
            block = np.s_[128 * row : 128 * row + 128, 128 * column : 128 * column + 128]
            product[block] *= scale[row, column].item()
        assert np.array_equal(product, weight.numpy())
        if powers_of_two:
            assert bool((scale.log2() % 1 == 0).all())


def test_the_configuration_lists_every_projection_that_is_left(model: Path, tmp_path: Path) -> None:
    projections = write(model, tmp_path / "q", Recipe.of("fp8-block", ignore=["*.kv_b_proj"]))
    config = dict(ModelDirectory.open(tmp_path / "q").config)
    section = config.pop("quantization_config")
    assert config == ModelDirectory.open(model).config
    left = section.pop("modules_to_not_convert")
    assert section == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    assert set(left) == {name for name, one in projections.items() if not one.is_quantised}
    assert "model.layers.0.self_attn.kv_b_proj" in left
    written = read(tmp_path / "q")
    assert {name.removesuffix(".weight_scale_inv") for name in written if "scale" in name} == {
        name for name, one in projections.items() if one.is_quantised
    }


def test_scale_format_is_said(model: Path, tmp_path: Path) -> None:
    write(model, tmp_path / "q", Recipe.of("fp8-block", powers_of_two=True))
    section = ModelDirectory.open(tmp_path / "q").config["quantization_config"]
    assert section["scale_fmt"] == "ue8m0"


def test_everything_else_is_copied_bit_for_bit(model: Path, tmp_path: Path) -> None:
    projections = write(model, tmp_path / "q", Recipe.of("fp8-block"))
    before, after = read(model), read(tmp_path / "q")
    kept = {
        name
        for name in before
        if not projections.get(name.removesuffix(".weight"), projections["lm_head"]).is_quantised
    }
    assert len(kept) > 40
    assert all(torch.equal(after[name], before[name]) for name in kept)


def test_transformers_reads_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers
    from transformers.quantizers import quantizer_finegrained_fp8

    # It asks for accelerate, which it does not use on a processor.
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    # It spreads blocks evenly over a weight: right where they divide it, or where there is one.
    model = save_tiny(
        tmp_path / "m", hidden_size=256, num_attention_heads=2, num_hidden_layers=2, tokenizer=False
    )
    projections = write(model, tmp_path / "q", Recipe.of("fp8-block"))
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "q", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    weights = unfused(theirs.state_dict())
    expected = expected_weights(model, projections)
    assert {256} < {weight.shape[1] for weight in expected.values()}
    for module, weight in expected.items():
        assert torch.equal(weights[f"{module}.weight"], weight), module
