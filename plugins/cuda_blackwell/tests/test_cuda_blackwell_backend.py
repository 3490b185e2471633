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
from tests.fixtures.tiny_models import INDEXER, save_tiny

from mortise.backends import Stage, discover_backends, load_backend
from mortise.errors import BackendUnusableError, ConfigError
from mortise.plugin import (
    ExpertLayerRequest,
    LinearLayerRequest,
    ModelRole,
    ReasonCode,
    WeightScheme,
)
from mortise_cuda_blackwell.backend import BlackwellBackend

if TYPE_CHECKING:
    from pathlib import Path

    from mortise.backends import BoundBackend

NAME = "cuda_blackwell"
SERVED = (
    WeightScheme.FLOAT,
    WeightScheme.FP8_BLOCK,
    WeightScheme.W4A16,
    WeightScheme.NVFP4,
)
REFUSED = tuple(scheme for scheme in WeightScheme if scheme not in SERVED)
bf16 = torch.bfloat16

IMPORTING = """
import json, sys
import torch
import mortise_cuda_blackwell.backend
print(json.dumps([name for name in ("triton", "deep_gemm", "deep_ep") if name in sys.modules]))
"""


def bound(**options: object) -> BoundBackend:
    return load_backend(NAME, role=ModelRole.MAIN, device="emulated", options=options)


def test_it_is_listed_as_usable_and_imports_no_vendor_library() -> None:
    (row,) = [row for row in discover_backends() if row.name == NAME]
    assert row.stage is Stage.COMPATIBLE
    assert row.usable
    child = subprocess.run(
        [sys.executable, "-c", IMPORTING], capture_output=True, text=True, check=True
    )
    assert set(json.loads(child.stdout)) <= {"triton"}, "Triton's language is looked at by name"


def test_its_manifest_promises_what_it_serves() -> None:
    text = files("mortise_cuda_blackwell").joinpath("backend.toml").read_text(encoding="utf-8")
    promised = tomllib.loads(text)["capabilities"]
    served = bound().ops.capabilities
    assert served.schemes == set(promised["schemes"]) == set(SERVED)
    assert served.dispatch_dtypes == set(promised["dispatch_dtypes"])
    assert [f"torch.{name}" for name in promised["compute_dtypes"]] == [
        str(dtype) for dtype in served.compute_dtypes
    ]
    assert served.page_sizes == set(promised["page_sizes"])
    assert served.emulated is promised["emulation"] is True


@pytest.mark.parametrize("generation", ["B200", "B300"])
def test_capabilities_of_the_emulated_chip(generation: str) -> None:
    served = bound(generation=generation).ops.capabilities
    assert served.num_workers == 148
    assert (served.device, served.process_group_backend) == (torch.device("cpu"), "gloo")
    assert bound(num_workers=7).ops.capabilities.num_workers == 7


def test_rows_of_one_request_are_scored_at_once_where_deep_gemm_can() -> None:
    assert bound(indexer="deep_gemm").ops.capabilities.max_native_next_n > 4
    assert bound(indexer="triton").ops.capabilities.max_native_next_n == 1


@pytest.mark.parametrize(
    ("nvfp4", "value", "reason"),
    [
        ("triton", "not used", "option nvfp4 is 'triton'"),
        ("flashinfer", "0.6.18", "its emulation; it multiplies NVFP4 rows in slots"),
    ],
)
def test_which_libraries_serve_is_told(nvfp4: str, value: str, reason: str) -> None:
    told = {one.subject: one for one in bound(nvfp4=nvfp4).backend.choices()}
    assert set(told) == {"DeepGEMM", "FlashInfer"}
    assert (told["FlashInfer"].value, told["FlashInfer"].reason) == (value, reason)


@pytest.mark.parametrize("generation", ["B200", "B300"])
def test_nothing_is_left_to_the_reference(generation: str) -> None:
    assert bound(generation=generation).fallbacks == ()


def test_the_table_of_options_is_checked() -> None:
    with pytest.raises(ConfigError, match="did you mean 'runner'"):
        bound(runer="triton")
    with pytest.raises(ConfigError, match="generation is 'B100'"):
        bound(generation="B100")


def test_a_machine_without_the_chip_says_what_is_missing() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA")
    with pytest.raises(BackendUnusableError, match="is built without CUDA") as caught:
        load_backend(NAME, role=ModelRole.MAIN)
    assert caught.value.reason is ReasonCode.IMPORT_FAILED


def experts(**changes: Any) -> ExpertLayerRequest:
    values: dict[str, Any] = {
        "role": ModelRole.MAIN,
        "layer": "model.layers.1.mlp",
        "scheme_w13": WeightScheme.FP8_BLOCK,
        "scheme_w2": WeightScheme.FP8_BLOCK,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_size": 256,
        "intermediate_size": 128,
        "compute_dtype": bf16,
        "num_local_experts": 8,
    }
    return ExpertLayerRequest(**{**values, **changes})


def projection(scheme: WeightScheme) -> LinearLayerRequest:
    return LinearLayerRequest(
        role=ModelRole.MAIN,
        layer="model.layers.1.self_attn.o_proj",
        scheme=scheme,
        out_features=192,
        in_features=128,
        num_groups=1,
        static_input=False,
        compute_dtype=bf16,
    )


@pytest.mark.parametrize("scheme", SERVED)
def test_what_it_serves(scheme: WeightScheme) -> None:
    ops = bound().ops
    answer = ops.supports(experts(scheme_w13=scheme, scheme_w2=scheme))
    assert answer.ok, answer.reason
    assert answer.method is not None
    assert answer.method.runner, "explain shows what multiplies"
    assert ops.supports_linear(projection(scheme)).ok


@pytest.mark.parametrize("scheme", REFUSED)
def test_what_it_refuses_is_named(scheme: WeightScheme) -> None:
    ops = bound().ops
    for changes in ({"scheme_w13": scheme}, {"scheme_w2": scheme}):
        answer = ops.supports(experts(**changes))
        assert not answer.ok
        assert scheme.value in answer.reason
    assert scheme.value in ops.supports_linear(projection(scheme)).reason


def test_each_role_has_its_own_object() -> None:
    main, draft = (
        load_backend(NAME, role=role, device="emulated", options={"runner": runner})
        for role, runner in ((ModelRole.MAIN, "deep_gemm"), (ModelRole.DRAFT, "triton"))
    )
    assert isinstance(main.backend, BlackwellBackend)
    assert main.backend is not draft.backend


SCHEMES = ("plain", "fp8-block", "w4a16", "nvfp4")
OF_THE_CHIP: dict[str, Any] = {
    **INDEXER,
    "index_head_dim": 128,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
"""The smallest sizes that DeepGEMM multiplies."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model with an indexer in each scheme, as `mortise quantize` writes it."""
    folder = tmp_path_factory.mktemp("models")
    plain = save_tiny(folder / "plain", **OF_THE_CHIP)
    for name in SCHEMES[1:]:
        outcome = mortise("quantize", folder / name, "--model", plain, "--scheme", name)
        assert outcome.code == 0, outcome.stderr
    return {"plain": plain} | {name: folder / name for name in SCHEMES[1:]}


def generated(model: Path, *options: str | Path) -> Outcome:
    return mortise(
        *("generate", "def f(a, b, c): return", "--model", model, "--json", "--max-tokens", "3"),
        *("--temperature", "0", *options),
    )


def on_chip(**options: str) -> list[str]:
    tables = [f"--set=backend_options.{NAME}.{key}={value}" for key, value in options.items()]
    return ["--backend", NAME, "--device", "emulated", *tables]


LOW_LATENCY = (
    "--set=dispatch.mode=low_latency",
    "--set=dispatch.max_tokens_per_rank=64",
    "--set=scheduler.max_num_batched_tokens=48",
)


def check(outcome: Outcome) -> None:
    assert outcome.code == 0, outcome.stderr
    assert f"warning: backend '{NAME}' is emulated" in outcome.stderr
    assert outcome.document["emulated"] is True
    assert len(outcome.document["completions"][0]["token_ids"]) == 3


@pytest.mark.parametrize("runner", ["auto", "deep_gemm", "triton"])
@pytest.mark.parametrize("name", SCHEMES)
def test_whole_models(models: dict[str, Path], name: str, runner: str) -> None:
    options = on_chip(runner=runner, indexer=runner)
    check(generated(models[name], *options, "--dtype", "bfloat16"))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["fp8-block", "nvfp4"])
@pytest.mark.parametrize("generation", ["B200", "B300"])
def test_whole_models_in_slots(models: dict[str, Path], name: str, generation: str) -> None:
    options = on_chip(generation=generation, nvfp4="flashinfer")
    outcome = generated(models[name], *options, "--dtype", "bfloat16", *LOW_LATENCY)
    check(outcome)
    # Several layers of experts, and one line.
    told = outcome.stderr.count("gate and up have different global scales")
    assert told == (1 if name == "nvfp4" else 0)


def test_a_float32_model_gives_the_tokens_of_the_reference(models: dict[str, Path]) -> None:
    options = ("--dtype", "float32", "--max-tokens", "8")
    there = generated(models["plain"], *on_chip(), *options).document
    here = generated(models["plain"], *options).document
    assert there["completions"][0]["token_ids"] == here["completions"][0]["token_ids"]


@pytest.mark.parametrize(
    ("name", "sent"), [("fp8-block", "fp8, "), ("nvfp4", "nvfp4, "), ("plain", "bf16, ")]
)
def test_explain_shows_what_travels(models: dict[str, Path], name: str, sent: str) -> None:
    outcome = mortise(
        *("explain", "--json", "--model", models[name], "--dtype", "bfloat16"), *on_chip()
    )
    assert outcome.code == 0, outcome.stderr
    values = [one["value"] for one in outcome.document["decisions"]]
    assert any(value.startswith(sent) for value in values), values


def test_fp8_rows_for_experts_in_bfloat16_are_refused_when_the_layer_is_built(
    models: dict[str, Path],
) -> None:
    message = failure(
        *("generate", "def f", "--model", models["plain"], "--dtype", "bfloat16"),
        *("--dispatch-dtype", "fp8", *on_chip()),
    )
    assert "its experts cannot consume fp8 rows" in message
    assert "expected: one of bf16" in message


def test_a_quantised_model_in_float32_is_refused_by_name(models: dict[str, Path]) -> None:
    message = failure(
        *("generate", "def f", "--model", models["nvfp4"], "--dtype", "float32"), *on_chip()
    )
    assert "layer model.layers." in message
    assert "float32" in message


TEXT = """def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [line.rstrip() for line in file]
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["fp8-block", "nvfp4"])
def test_the_built_in_model_predicts_as_the_reference_does(scheme: str, tmp_path: Path) -> None:
    """On a short text, to a tenth of a nat: a scale that is missed is a matter of several."""
    copy, text = tmp_path / scheme, tmp_path / "text.py"
    text.write_text(TEXT, encoding="utf-8")
    assert mortise("quantize", copy, "--scheme", scheme).code == 0
    found, wanted = (
        mortise("eval", text, "--model", copy, "--dtype", "bfloat16", "--json", *options)
        for options in (on_chip(), [])
    )
    assert found.code == wanted.code == 0, found.stderr
    assert found.document["emulated"] is True
    (here,), (there,) = (one.document["scores"] for one in (found, wanted))
    assert here["predicted_tokens"] == there["predicted_tokens"] > 20
    assert abs(here["nats_per_token"] - there["nats_per_token"]) < 0.1
    outcome = mortise(
        *("generate", "def add(a, b):", "--model", copy, "--dtype", "bfloat16", "--json"),
        *("--max-tokens", "4", "--temperature", "0", *on_chip()),
    )
    assert len(outcome.document["completions"][0]["token_ids"]) == 4
