"""Models from quantised checkpoints compute what transformers computes with the same numbers.

transformers is given the weights that the checkpoint stands for, and an input quantiser in front
of every projection; the engine loads the checkpoint itself. One layer each: further layers would
enlarge the difference of a single value that is rounded the other way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mortise import LLM, EngineConfig
from mortise.formats.fp8 import dequantise_fp8_rows, quantise_fp8_rows
from mortise.formats.nvfp4 import dequantise_nvfp4, quantise_nvfp4
from mortise.formats.weights import dequantise_weight
from mortise.spec.weights import ScaleFormat, WeightScheme
from tests.fixtures.compressed_models import INPUT_GLOBAL_SCALE, save_compressed, unfuse_experts
from tests.fixtures.fp8_models import BLOCKS, save_fp8
from tests.fixtures.loaded_checkpoints import load_all, shapes_of
from tests.fixtures.modelslim_models import INPUT_OFFSET, INPUT_SCALE, save_modelslim
from tests.fixtures.tiny_models import save_tiny, tiny_transformers_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Quantiser = Callable[[torch.Tensor], torch.Tensor]

TOLERANCE = 1e-4
TOKENS = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(1))
# Every key is seen: which ones are chosen among others hangs on the last bit of a score.
MODELS: dict[str, dict[str, Any]] = {
    "v3, experts": {"model_type": "deepseek_v3", "first_k_dense_replace": 0},
    "v32, dense": {"index_topk": 512, "first_k_dense_replace": 1},
    "glm, experts": {
        "model_type": "glm_moe_dsa",
        "index_topk": 512,
        "first_k_dense_replace": 0,
    },
    "glm4, experts": {"model_type": "glm4_moe", "first_k_dense_replace": 0},
    "qwen3_next, attention": {"model_type": "qwen3_next", "layer_types": ["full_attention"]},
    "qwen3_next, delta net": {"model_type": "qwen3_next", "layer_types": ["linear_attention"]},
    "qwen3.5, delta net": {"model_type": "qwen3_5_moe_text", "layer_types": ["linear_attention"]},
}


@dataclass(frozen=True)
class Case:
    """A checkpoint.

    Args:
        save: writes it, given its directory, a directory for the model as it was, and overrides.
        quantise: what happens to the input of every projection but those that are used as floats.
        sizes: overrides.
    """

    save: Callable[..., None]
    quantise: Quantiser
    sizes: dict[str, Any]


def integers(largest: int) -> Quantiser:
    """Rows to integers and back."""

    def quantise(rows: torch.Tensor) -> torch.Tensor:
        amax = rows.abs().amax(-1, keepdim=True)
        values = (rows * (largest / amax)).round()
        return torch.where(amax > 0, values * (amax / largest), 0.0)

    return quantise


def static(rows: torch.Tensor) -> torch.Tensor:
    """Rows to int8 by a scale and an offset fixed beforehand, and back."""
    scale, offset = float(INPUT_SCALE), float(INPUT_OFFSET)
    values = (rows / torch.tensor(scale) + offset).round().clamp(-128, 127)
    return (values - offset) * scale


def float8(scale_format: ScaleFormat) -> Quantiser:
    """Rows to float8 per 128 columns and back."""
    return lambda rows: dequantise_fp8_rows(*quantise_fp8_rows(rows, scale_format))


def float4(rows: torch.Tensor) -> torch.Tensor:
    """Rows to float4 under the global scale of the fixture and back."""
    multiplier = torch.tensor(1 / INPUT_GLOBAL_SCALE)
    return dequantise_nvfp4(*quantise_nvfp4(rows, multiplier), multiplier)


def unquantised(rows: torch.Tensor) -> torch.Tensor:
    return rows


def compressed(preset: str, **options: Any) -> Callable[..., None]:
    def save(path: Path, original: Path, **overrides: Any) -> None:
        save_tiny(original, tokenizer=False, **overrides)
        save_compressed(path, {preset: ["Linear"]}, dtype=torch.float32, **options, **overrides)

    return save


def modelslim(kind: str) -> Callable[..., None]:
    def type_of(module: str) -> str:
        return kind if module.endswith(("_proj", "_mqa", "wq_b", "wk")) else "FLOAT"

    def save(path: Path, original: Path, **overrides: Any) -> None:
        save_tiny(original, tokenizer=False, **overrides)
        save_modelslim(path, original, type_of)

    return save


def float8_blocks(scale_fmt: str) -> Callable[..., None]:
    def save(path: Path, original: Path, **overrides: Any) -> None:
        save_fp8(path, original, scale_fmt=scale_fmt, **overrides)

    return save


CASES = {
    "compressed-tensors W8A8": Case(compressed("W8A8"), integers(127), {}),
    "compressed-tensors W4A16": Case(compressed("W4A16"), unquantised, {}),
    "compressed-tensors W4A8": Case(compressed("W4A8"), integers(127), {}),
    "compressed-tensors W4A4": Case(compressed("W4A4"), integers(7), {}),
    "compressed-tensors NVFP4": Case(compressed("NVFP4"), float4, {}),
    "compressed-tensors NVFP4A16": Case(compressed("NVFP4A16"), unquantised, {}),
    "fp8 float": Case(float8_blocks("float"), float8(ScaleFormat.FLOAT32), BLOCKS),
    "fp8 ue8m0": Case(float8_blocks("ue8m0"), float8(ScaleFormat.UE8M0), BLOCKS),
    "ModelSlim W8A8": Case(modelslim("W8A8"), static, {}),
    "ModelSlim W8A8_DYNAMIC": Case(modelslim("W8A8_DYNAMIC"), integers(127), {}),
    "ModelSlim W4A8_DYNAMIC": Case(modelslim("W4A8_DYNAMIC"), integers(127), {}),
    "ModelSlim W4A8_DYNAMIC, staged": Case(modelslim("W4A8_DYNAMIC/staged"), integers(127), {}),
    "ModelSlim W4A4_DYNAMIC": Case(modelslim("W4A4_DYNAMIC"), integers(7), {}),
}


@torch.no_grad()
def transformers_logits(
    path: Path, original: Path, quantise: Quantiser, **overrides: Any
) -> torch.Tensor:
    """Logits of transformers' own forward pass with the weights that the checkpoint stands for."""
    model = tiny_transformers_model(**overrides)
    unfuse_experts(model)
    weights = load_all(path, shapes_of(original))
    placed = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name in weights:
            module.weight.data = dequantise_weight(weights[name])
            placed.add(f"{name}.weight")
            used_as_floats = name.endswith("kv_b_proj")
            if weights[name].scheme is not WeightScheme.FLOAT and not used_as_floats:
                module.register_forward_pre_hook(lambda _, rows: (quantise(rows[0]),))
    # Whoever saved the checkpoint may have rounded everything else.
    stored = {
        name: tensor
        for file in path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in stored and stored[name].is_floating_point() and name not in placed:
            tensor.copy_(stored[name])
    # Its cache wants a layer of attention.
    logits: torch.Tensor = model(TOKENS[None], use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers_with_the_same_numbers(
    tmp_path: Path, case: str, model: str
) -> None:
    described = CASES[case]
    overrides = {"num_hidden_layers": 1} | MODELS[model] | described.sizes
    path, original = tmp_path / "quantised", tmp_path / "original"
    described.save(path, original, **overrides)
    theirs = transformers_logits(path, original, described.quantise, **overrides)
    ours = LLM(EngineConfig(model=path, dtype="float32")).logits(TOKENS.tolist())
    difference = (ours - theirs).abs()
    if described.quantise is unquantised:
        assert difference.max() < TOLERANCE
    else:
        # A value between two integers may be rounded either way, and then its row differs a little.
        effect = (theirs - transformers_logits(path, original, unquantised, **overrides)).abs()
        assert difference.median() < TOLERANCE
        assert difference.mean() < 0.02 * effect.mean()


def test_a_checkpoint_that_mixes_schemes_generates(tmp_path: Path) -> None:
    groups = {
        "W4A16": [r"re:.*experts\.\d+\.(gate|up)_proj"],
        "NVFP4": [r"re:.*experts\.\d+\.down_proj"],
        "W8A8": ["Linear"],
    }
    save_compressed(tmp_path, groups, ignore=[r"re:.*indexer.*"], dtype=torch.float32)
    llm = LLM(EngineConfig(model=tmp_path, dtype="float32"))
    assert bool(llm.logits(TOKENS.tolist()).isfinite().all())
    values = {decision.value for decision in llm.decisions if decision.subject == "weights"}
    assert {value.split(" ", 2)[2] for value in values} >= {
        "w4a16 in groups of 16",
        "nvfp4",
        "w8a8",
    }
