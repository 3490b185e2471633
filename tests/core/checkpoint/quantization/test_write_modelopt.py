"""Modelopt's float4 is read with numpy from its published layout."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest
import torch
from tests.fixtures.quantised_models import (
    NUM_LAYERS,
    SEEN,
    expected_weights,
    read,
    save_odd,
    write,
)

from mortise.checkpoint import ModelDirectory
from mortise.checkpoint.json_file import read_json_object
from mortise.checkpoint.quantization.write.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

MAGNITUDES: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_odd(tmp_path_factory.mktemp("models") / "odd", tokenizer=False)


def float4(packed: np.ndarray) -> np.ndarray:
    """Two values a byte, the even column in the low nibble; bit 3 is the sign."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return np.where(codes & 8, -1, 1) * MAGNITUDES[codes & 7]


def test_values_times_two_scales(model: Path, tmp_path: Path) -> None:
    projections = write(model, tmp_path / "q", Recipe.of("nvfp4", "modelopt"))
    before, written = read(model), read(tmp_path / "q")
    expected = expected_weights(model, projections)
    assert expected
    for module, weight in expected.items():
        leaves = {
            name.removeprefix(f"{module}.") for name in written if name.startswith(f"{module}.")
        }
        assert leaves == {"weight", "weight_scale", "weight_scale_2", "input_scale"}
        packed, scale = written[f"{module}.weight"], written[f"{module}.weight_scale"]
        assert (packed.dtype, scale.dtype) == (torch.uint8, torch.float8_e4m3fn)
        factor, input_factor = (
            written[f"{module}.{leaf}"] for leaf in ("weight_scale_2", "input_scale")
        )
        assert factor.shape == input_factor.shape == ()
        # A factor, not the divisor that other programs store.
        amax = before[f"{module}.weight"].abs().max().item()
        assert factor.item() == pytest.approx(amax / 2688, rel=1e-6)
        assert input_factor.item() == pytest.approx(SEEN.amax / 2688, rel=1e-6)
        product = float4(packed.numpy()) * np.repeat(scale.float().numpy(), 16, axis=1)
        np.testing.assert_allclose(product * factor.item(), weight.numpy(), rtol=2**-22)


def test_both_files_exclude_what_is_left(model: Path, tmp_path: Path) -> None:
    projections = write(
        model, tmp_path / "q", Recipe.of("nvfp4", "modelopt", ignore=["*.layers.0.*.o_proj"])
    )
    section = ModelDirectory.open(tmp_path / "q").config["quantization_config"]
    own = read_json_object(tmp_path / "q" / "hf_quant_config.json")
    assert section["quant_method"] == "modelopt"
    assert section["quant_algo"] == own["quantization"]["quant_algo"] == "NVFP4"
    assert own["quantization"]["group_size"] == 16
    assert own["quantization"]["kv_cache_quant_algo"] is None
    assert own["producer"] == section["producer"]
    excluded = own["quantization"]["exclude_modules"]
    assert section["ignore"] == excluded
    assert f"model.layers.{NUM_LAYERS}.*" in excluded
    # As programs match them that serve such models.
    left = {
        module
        for module in projections
        if any(fnmatch.fnmatchcase(module, pattern) for pattern in excluded)
    }
    assert left == {module for module, one in projections.items() if not one.is_quantised}
    # 136 columns of the latent query are no whole blocks.
    assert "model.layers.0.self_attn.q_b_proj" in left
    assert "model.layers.0.self_attn.o_proj" in left
    assert "model.layers.1.self_attn.o_proj" not in left
