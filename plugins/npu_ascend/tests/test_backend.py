"""What the backend says of itself, which layers it refuses and why, and whole models on it."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.cli.command_line import Outcome, failure, mortise
from tests.fixtures.tiny_models import save_tiny

from mortise.backends import Stage, discover_backends, load_backend
from mortise.errors import ConfigError
from mortise.plugin import (
    DispatchDtype,
    ExpertLayerRequest,
    LinearLayerRequest,
    ModelRole,
    WeightScheme,
)
from mortise_npu_ascend.backend import AscendBackend
from mortise_npu_ascend.dispatch import Generation

if TYPE_CHECKING:
    from pathlib import Path

    from mortise.backends import BoundBackend

NAME = "npu_ascend"
INT4 = (WeightScheme.W4A8, WeightScheme.W4A4, WeightScheme.W4A16)
bf16 = torch.bfloat16

IMPORTING = """
import json, sys
import torch
import mortise_npu_ascend.backend
print(json.dumps(["torch_npu" in sys.modules, dir(torch.ops.npu)]))
"""


def bound(generation: Generation | None = None, **options: object) -> BoundBackend:
    if generation is not None:
        options["generation"] = generation.value
    return load_backend(NAME, role=ModelRole.MAIN, device="emulated", options=options)


def test_it_is_listed_as_usable_and_reads_no_library() -> None:
    (row,) = [row for row in discover_backends() if row.name == NAME]
    assert row.stage is Stage.COMPATIBLE
    assert row.usable
    child = subprocess.run(
        [sys.executable, "-c", IMPORTING], capture_output=True, text=True, check=True
    )
    imported, operators = json.loads(child.stdout)
    assert not imported
    assert not [name for name in operators if name.startswith("npu_")]


@pytest.mark.parametrize("generation", Generation)
def test_its_manifest_promises_no_less_than_any_generation_serves(generation: Generation) -> None:
    text = files("mortise_npu_ascend").joinpath("backend.toml").read_text(encoding="utf-8")
    promised = tomllib.loads(text)["capabilities"]
    served = bound(generation).ops.capabilities
    assert served.schemes <= set(promised["schemes"])
    assert served.dispatch_dtypes == set(promised["dispatch_dtypes"])
    assert [f"torch.{name}" for name in promised["compute_dtypes"]] == [
        str(dtype) for dtype in served.compute_dtypes
    ]
    assert served.page_sizes == set(promised["page_sizes"])
    assert served.emulated is promised["emulation"]


def test_capabilities_of_an_emulated_chip() -> None:
    older = {WeightScheme.FLOAT, WeightScheme.W8A8, *INT4}
    for generation in Generation:
        served = bound(generation).ops.capabilities
        missing = {WeightScheme.W4A4} if generation is Generation.A5 else set()
        assert served.schemes == older - missing
        assert DispatchDtype.NVFP4 not in served.dispatch_dtypes
        assert served.device == torch.device("cpu")
        assert served.process_group_backend == "gloo"
    assert bound(num_workers=7).ops.capabilities.num_workers == 7


def test_the_table_of_options_is_checked() -> None:
    with pytest.raises(ConfigError, match="did you mean 'generation'"):
        bound(generatio="A2")


def experts(**changes: Any) -> ExpertLayerRequest:
    values: dict[str, Any] = {
        "role": ModelRole.MAIN,
        "layer": "model.layers.1.mlp",
        "scheme_w13": WeightScheme.FLOAT,
        "scheme_w2": WeightScheme.FLOAT,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_size": 256,
        "intermediate_size": 128,
        "compute_dtype": bf16,
        "num_local_experts": 8,
    }
    return ExpertLayerRequest(**{**values, **changes})


def both(scheme: WeightScheme, **changes: Any) -> dict[str, Any]:
    return {"scheme_w13": scheme, "scheme_w2": scheme, **changes}


EXPERTS = [
    ({}, "", ""),
    ({"compute_dtype": torch.float32}, "", ""),
    ({"compute_dtype": torch.float16}, "the compute dtype is torch.float16", "same"),
    (both(WeightScheme.W8A8), "", ""),
    (both(WeightScheme.W4A8), "", ""),
    (both(WeightScheme.W4A16), "", ""),
    ({"scheme_w13": WeightScheme.W4A4, "scheme_w2": WeightScheme.W8A8}, "", "w13: its weight"),
    ({"scheme_w2": WeightScheme.W4A4}, "", "w2: its weight is stored as w4a4, and the matrix"),
    (
        {"scheme_w2": WeightScheme.W8A8, "compute_dtype": torch.float32},
        "the compute dtype is torch.float32, and products with w8a8 weights take and give bfloat16",
        "same",
    ),
    (both(WeightScheme.FP8_BLOCK), "w13: its weight is stored as fp8_block", "same"),
    ({"scheme_w2": WeightScheme.NVFP4}, "w2: its weight is stored as nvfp4", "same"),
    (
        {"scheme_w13": WeightScheme.W8A8, "static_input": True},
        "w13: its input has a static scale",
        "same",
    ),
    ({"num_local_experts": 1025}, "1025 experts of a rank are more than 1024", "same"),
    ({"hidden_size": 65536}, "w13: its 65536 columns are more than 65535", "same"),
    ({"intermediate_size": 32768}, "w13: its 65536 rows are more than 65535", "same"),
    (
        {"scheme_w13": WeightScheme.W4A8, "intermediate_size": 32764},
        "",
        "w13: its 65536 rows are more than 65535",
    ),
    (both(WeightScheme.W8A8, hidden_size=20, intermediate_size=12), "", ""),
    (both(WeightScheme.W4A16, hidden_size=20), "w13: a dimension of 20 cannot be divided", "same"),
    (
        {"scheme_w2": WeightScheme.W4A16, "hidden_size": 20},
        "w2: its 20 rows are no multiple",
        "same",
    ),
    ({"scheme_w2": WeightScheme.W4A8, "hidden_size": 96}, "", ""),
    ({"scheme_w13": WeightScheme.W4A8, "hidden_size": 18432}, "", ""),
    (
        {"scheme_w13": WeightScheme.W4A8, "hidden_size": 18440},
        "w13: its 1 groups of 18440 columns, padded to 18688, are 18688 columns, more than 18432",
        "",
    ),
    ({"scheme_w13": WeightScheme.W4A8, "hidden_size": 7168, "num_groups_w13": 56}, "", ""),
    (
        {"scheme_w13": WeightScheme.W4A8, "hidden_size": 7168, "num_groups_w13": 112},
        "w13: its 112 groups of 64 columns, padded to 256, are 28672 columns, more than 18432",
        "",
    ),
    (
        {"scheme_w13": WeightScheme.W4A8, "hidden_size": 32768, "num_groups_w13": 1024},
        "w13: its 1024 groups of 32 columns, padded to 256, are 262144 columns",
        "w13: its 1024 groups of 32 columns, padded to 128, are 131072 columns, more than 65535",
    ),
    (
        {"scheme_w2": WeightScheme.W4A16, "intermediate_size": 144, "num_groups_w2": 9},
        "",
        "w2: its groups of 16 columns are no multiple of 32, 64, 128, 256",
    ),
    ({"scheme_w2": WeightScheme.W4A16, "intermediate_size": 192, "num_groups_w2": 2}, "", ""),
    (
        {"scheme_w2": WeightScheme.W4A4, "intermediate_size": 24, "num_groups_w2": 8},
        "w2: its groups of 3 columns are odd",
        "w2: its weight is stored as w4a4",
    ),
    (
        {"scheme_w2": WeightScheme.W4A8, "num_groups_w2": 3},
        "w2: a dimension of 128 cannot be divided into groups of columns",
        "same",
    ),
]


@pytest.mark.parametrize("generation", Generation)
@pytest.mark.parametrize(("changes", "older", "newest"), EXPERTS)
def test_which_experts_it_serves(
    changes: dict[str, Any], older: str, newest: str, generation: Generation
) -> None:
    reason = newest.replace("same", older) if generation is Generation.A5 else older
    answer = bound(generation).ops.supports(experts(**changes))
    assert answer.ok is (not reason)
    assert answer.reason.startswith(reason)


def projection(scheme: WeightScheme, **changes: Any) -> LinearLayerRequest:
    values: dict[str, Any] = {
        "role": ModelRole.MAIN,
        "layer": "model.layers.1.self_attn.o_proj",
        "scheme": scheme,
        "out_features": 192,
        "in_features": 128,
        "num_groups": 1,
        "static_input": False,
        "compute_dtype": bf16,
    }
    return LinearLayerRequest(**{**values, **changes})


PROJECTIONS = [
    (WeightScheme.FLOAT, {"compute_dtype": torch.float32}, "", ""),
    (WeightScheme.W8A8, {}, "", ""),
    (WeightScheme.W8A8, {"static_input": True}, "", ""),
    (WeightScheme.W8A8, {"compute_dtype": torch.float32}, "the compute dtype is", "same"),
    (WeightScheme.W8A8, {"out_features": 200_000}, "", ""),
    (WeightScheme.W4A8, {"out_features": 65528}, "", ""),
    (WeightScheme.W8A8, {"in_features": 65536}, "its 65536 columns are more than", "same"),
    (WeightScheme.W4A8, {"num_groups": 4}, "", ""),
    (WeightScheme.W4A8, {"out_features": 136}, "", ""),
    (WeightScheme.W4A8, {"in_features": 20480}, "its 1 groups of 20480 columns", ""),
    (WeightScheme.W4A4, {}, "", "its weight is stored as w4a4, and the matrix units of the A5"),
    (WeightScheme.W4A4, {"num_groups": 4}, "", "its weight is stored as w4a4"),
    (WeightScheme.W4A16, {"num_groups": 4}, "", ""),
    (
        WeightScheme.W4A16,
        {"num_groups": 8},
        "its groups of 16 columns are no multiple of 32",
        "same",
    ),
    (WeightScheme.W4A16, {"out_features": 12}, "its 12 rows are no multiple of 8", "same"),
    (WeightScheme.FP8_BLOCK, {}, "its weight is stored as fp8_block", "same"),
    (WeightScheme.NVFP4, {"static_input": True}, "its weight is stored as nvfp4", "same"),
]


@pytest.mark.parametrize("generation", Generation)
@pytest.mark.parametrize(("scheme", "changes", "older", "newest"), PROJECTIONS)
def test_which_projections_it_serves(
    scheme: WeightScheme, changes: dict[str, Any], older: str, newest: str, generation: Generation
) -> None:
    reason = newest.replace("same", older) if generation is Generation.A5 else older
    answer = bound(generation).ops.supports_linear(projection(scheme, **changes))
    assert answer.ok is (not reason)
    assert answer.reason.startswith(reason)


def test_each_role_has_its_own_object() -> None:
    main, draft = (
        load_backend(NAME, role=role, device="emulated", options={"generation": generation})
        for role, generation in ((ModelRole.MAIN, "A2"), (ModelRole.DRAFT, "A5"))
    )
    assert isinstance(main.backend, AscendBackend)
    assert main.backend is not draft.backend
    assert WeightScheme.W4A4 in main.ops.capabilities.schemes
    assert WeightScheme.W4A4 not in draft.ops.capabilities.schemes


WRITTEN_BY = {
    "w8a8": ["--scheme", "w8a8"],
    "w8a8-static": ["--scheme", "w8a8-static", "--scheme-for", "*.experts.*=w8a8"],
    "w4a8": ["--scheme", "w4a8", "--group-size", "32"],
    "w4a16": ["--scheme", "w4a16", "--group-size", "32"],
    "w4a4": ["--scheme", "w4a4"],
    "w4a4 into w8a8": ["--scheme", "w4a4", "--scheme-for", "*.experts.*.down_proj=w8a8"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model in each scheme, as `mortise quantize` writes it."""
    folder = tmp_path_factory.mktemp("models")
    plain = save_tiny(folder / "plain")
    for name, options in WRITTEN_BY.items():
        outcome = mortise("quantize", folder / name, "--model", plain, *options)
        assert outcome.code == 0, outcome.stderr
    return {"plain": plain} | {name: folder / name for name in WRITTEN_BY}


def generated(model: Path, *options: str | Path) -> Outcome:
    return mortise(
        *("generate", "def f", "--model", model, "--json", "--max-tokens", "4", "--temperature"),
        *("0", *options),
    )


def on_chip(generation: str, folder: Path, strict: bool = True) -> list[str | Path]:
    config = folder / "engine.toml"
    config.write_text(
        f'backend = "{NAME}"\ndevice = "emulated"\n[backend_options.{NAME}]\n'
        f'generation = "{generation}"\nstrict = {str(strict).lower()}\n',
        encoding="utf-8",
    )
    return ["--config", config]


@pytest.mark.parametrize("generation", Generation)
@pytest.mark.parametrize("name", ["plain", *WRITTEN_BY])
def test_whole_models(
    models: dict[str, Path], name: str, generation: Generation, tmp_path: Path
) -> None:
    outcome = generated(models[name], *on_chip(generation, tmp_path), "--dtype", "bfloat16")
    if generation is Generation.A5 and "w4a4" in name:
        assert (outcome.code, outcome.stdout) == (2, "")
        assert "its weight is stored as w4a4, and the matrix units of the A5" in outcome.stderr
        return
    assert outcome.code == 0, outcome.stderr
    assert f"warning: backend '{NAME}' is emulated" in outcome.stderr
    assert outcome.document["emulated"] is True
    assert len(outcome.document["completions"][0]["token_ids"]) == 4


def test_a_float32_model_gives_the_tokens_of_the_reference(
    models: dict[str, Path], tmp_path: Path
) -> None:
    options = ("--dtype", "float32", "--max-tokens", "12")
    there = generated(models["plain"], *on_chip("A3", tmp_path), *options).document
    here = generated(models["plain"], *options).document
    assert there["completions"][0]["token_ids"] == here["completions"][0]["token_ids"]


def test_int8_rows_for_experts_in_bfloat16_are_refused_when_the_layer_is_built(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Elsewhere they met at run time: a draft that was not quantised, an exchange that was."""
    message = failure(
        *("generate", "def f", "--model", models["plain"], "--dtype", "bfloat16"),
        *("--dispatch-dtype", "int8", *on_chip("A2", tmp_path)),
    )
    assert "its experts cannot consume int8 rows" in message
    assert "expected: one of bf16" in message


def test_fp8_rows_become_int8_with_a_reason(models: dict[str, Path], tmp_path: Path) -> None:
    outcome = mortise(
        *("explain", "--json", "--model", models["w8a8"], "--dtype", "bfloat16"),
        *("--dispatch-dtype", "fp8", *on_chip("A2", tmp_path)),
    )
    decisions = [one for one in outcome.document["decisions"] if "mlp" in one["subject"]]
    assert decisions
    assert all(one["value"].startswith("int8") for one in decisions)
    assert all("int8 instead of fp8" in one["reason"] for one in decisions)


def test_a_quantised_model_in_float32_is_refused_by_name(
    models: dict[str, Path], tmp_path: Path
) -> None:
    message = failure(
        *("generate", "def f", "--model", models["w8a8"], "--dtype", "float32"),
        *on_chip("A2", tmp_path),
    )
    assert "take and give bfloat16 on this device" in message
    assert "layer model.layers." in message


def test_experts_with_a_static_input_are_refused_by_name(tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain")
    static = tmp_path / "static"
    assert mortise("quantize", static, "--model", plain, "--scheme", "w8a8-static").code == 0
    message = failure(
        *("generate", "def f", "--model", static, "--dtype", "bfloat16"),
        *on_chip("A2", tmp_path),
    )
    assert "layer model.layers.1.mlp: w13: its input has a static scale" in message
