"""``mortise quantize``: what it writes runs, and what it cannot write it refuses by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file

from mortise import LLM, EngineConfig, SamplingParams
from mortise.checkpoint.quantization.write import recipe
from mortise.cli import quantize
from mortise.config import DraftConfig
from tests.cli.command_line import failure, mortise
from tests.cli.test_documents import assert_documented
from tests.fixtures.drafted_models import save_drafted

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "def f(x):\n    return x\n" * 20


def test_options_name_what_there_is() -> None:
    assert set(quantize.SCHEMES) == set(recipe.SCHEMES) - {recipe.FLOAT}
    assert tuple(recipe.DIALECTS) == quantize.DIALECTS


def test_the_built_in_model_is_quantised_and_runs(builtin: Path, tmp_path: Path) -> None:
    outcome = mortise("quantize", tmp_path / "q", "--scheme", "fp8-block")
    assert outcome.code == 0, outcome
    lines = [" ".join(line.split()) for line in outcome.stdout.splitlines()]
    before, after = (
        sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values())
        for path in (builtin, tmp_path / "q")
    )
    assert lines[0].startswith(f"{tmp_path / 'q'}: fp8, {after} bytes instead of {before}; ")
    assert lines[2] == "quantised scheme projections bytes before bytes after error"
    assert lines[3].startswith("mlp.down_proj fp8-block 1 24576 6148 0.0")
    left = lines[lines.index("unquantised projections reason") + 1 :]
    assert left[0].split(maxsplit=2)[:2] == ["lm_head", "1"]
    assert "mlp.gate 2 router" in left
    assert mortise("generate", "x", "--model", tmp_path / "q", "--max-tokens", "2").code == 0


def test_documents(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text(TEXT)
    outcome = mortise(
        "quantize",
        tmp_path / "q",
        "--model",
        tiny_model,
        "--scheme",
        "nvfp4",
        "--calibration",
        text,
        "--json",
    )
    document = outcome.document
    assert_documented("quantize", document)
    assert document["calibration"] == {"text": str(text), "sequences": 4, "tokens": 462}
    assert document["dialect"] == "compressed-tensors"
    assert document["output"] == str(tmp_path / "q")
    (down,) = [one for one in document["quantised"] if one["kind"] == "mlp.experts.*.down_proj"]
    assert (down["scheme"], down["group_size"], down["projections"]) == ("nvfp4", None, 16)
    assert down["bytes_after"] == 16 * (64 * 32 // 2 + 64 * 2 + 4 + 4)
    assert 0.05 < down["relative_error"] < 0.15
    assert sum(one["projections"] for one in document["quantised"]) == 3 * 7 + 3 + 2 * (24 + 3)
    assert LLM(model=str(tmp_path / "q")).logits([1, 2, 3]).isfinite().all()


def test_without_a_text_the_model_writes_one(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["--model", tiny_model, "--scheme", "w8a8-static", "--json"]
    for name in ("a", "b"):
        document = mortise("quantize", tmp_path / name, *arguments).document
        assert document["calibration"] == {"text": None, "sequences": 16, "tokens": 2048}
    files = [tmp_path / name / "quant_model_weights.safetensors" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_schemes_for_parts(tiny_model: Path, tmp_path: Path) -> None:
    document = mortise(
        "quantize",
        tmp_path / "q",
        "--model",
        tiny_model,
        "--scheme",
        "w4a16",
        "--group-size",
        "32",
        "--scheme-for",
        "*.experts.*=w8a8",
        "--scheme-for",
        "*.q_a_proj=float",
        "--ignore",
        "*.kv_b_proj",
        "--json",
    ).document
    schemes = {one["kind"]: (one["scheme"], one["group_size"]) for one in document["quantised"]}
    assert schemes["mlp.experts.*.up_proj"] == ("w8a8", None)
    assert schemes["self_attn.o_proj"] == ("w4a16", 32)
    # 48 columns of the latent query.
    assert schemes["self_attn.q_b_proj"] == ("w4a16", None)
    reasons = {one["kind"]: one["reason"] for one in document["unquantised"]}
    assert reasons["self_attn.q_a_proj"] == "--scheme-for *.q_a_proj=float"
    assert reasons["self_attn.kv_b_proj"] == "--ignore *.kv_b_proj"
    table = mortise("quantize", tmp_path / "again", "--model", tiny_model, "--scheme", "w4a16")
    assert "w4a16 in groups of 128" not in table.stdout


@pytest.mark.parametrize("model_type", ["deepseek_v32", "qwen3_next"])
def test_drafts_are_quantised_and_run(tmp_path: Path, model_type: str) -> None:
    model = save_drafted(tmp_path / "model", model_type=model_type)
    document = mortise(
        "quantize",
        tmp_path / "q",
        "--model",
        model,
        "--scheme",
        "w8a8",
        "--draft-scheme",
        "nvfp4",
        "--json",
    ).document
    assert document["calibration"] is not None
    schemes = {one["kind"]: one["scheme"] for one in document["quantised"]}
    assert schemes["draft's mlp.experts.*.down_proj"] == "nvfp4"
    assert schemes["mlp.experts.*.down_proj"] == "w8a8"
    llm = LLM(EngineConfig(model=tmp_path / "q", draft=DraftConfig(num_tokens=2)))
    said = {(one.role.value, one.value) for one in llm.decisions if "projections" in one.value}
    assert {value.split()[-1] for role, value in said if role == "draft"} == {"nvfp4"}
    assert {value.split()[-1] for role, value in said if role == "main"} == {"w8a8"}
    sampling = SamplingParams(max_tokens=12, temperature=0.0)
    (drafted,) = llm.generate([[1, 2, 3]], sampling)
    (plain,) = LLM(model=str(tmp_path / "q")).generate([[1, 2, 3]], sampling)
    assert drafted.token_ids == plain.token_ids
    assert drafted.drafting is not None
    assert drafted.drafting.drafted > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--scheme", "nvfp4", "--dialect", "modelslim"],
            ["dialect modelslim cannot store scheme nvfp4", "compressed-tensors, modelopt"],
        ),
        (["--scheme", "w8a8", "--group-size", "128"], ["has no groups of columns"]),
        (["--scheme", "w8a8", "--scheme-for", "w4a16"], ["--scheme-for is 'w4a16'"]),
        (["--scheme", "w8a8", "--scheme-for", "=w4a16"], ["PATTERN=SCHEME"]),
        (["--scheme", "w8a8", "--scheme-for", "*=w4"], ["'w4' is not known"]),
        (["--scheme", "w8a8", "--ignore", "*.k_proj"], ["matches no projection", "closest: "]),
        (["--scheme", "w8a8", "--ue8m0"], ["--ue8m0 is given beside"]),
        (["--scheme", "w8a8", "--calibration", "x.txt"], ["no scheme asked for has a static"]),
        (["--scheme", "nvfp4", "--calibration", "x.txt"], ["'x.txt' cannot be read"]),
        (["--scheme", "w8a8", "--model", "nowhere"], ["'nowhere' does not exist"]),
        (
            ["--scheme", "w8a8", "--draft-scheme", "w8a8"],
            ["--draft-scheme is 'w8a8'", "no multi-token prediction layer"],
        ),
        (
            ["--scheme", "w8a8", "--draft-scheme", "w4a4"],
            ["dialect compressed-tensors cannot store scheme w4a4", "modelslim"],
        ),
        (["--scheme", "w8a8", "--draft-scheme", "w3"], ["'w3' is not one of"]),
        (["--scheme", "w8a9"], ["'w8a9' is not one of"]),
        ([], ["missing option '--scheme'"]),
    ],
)
def test_what_cannot_be_written(
    builtin: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    message = failure("quantize", tmp_path / "q", *arguments)
    for word in words:
        assert word in message
    assert not list(tmp_path.iterdir())


def test_a_directory_with_weights_is_left_alone(builtin: Path, tmp_path: Path) -> None:
    assert mortise("quantize", tmp_path / "q", "--scheme", "w8a8").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "q").iterdir()}
    message = failure("quantize", tmp_path / "q", "--scheme", "w4a16")
    assert "holds weights" in message
    assert {path.name: path.read_bytes() for path in (tmp_path / "q").iterdir()} == before
    message = failure("quantize", tmp_path / "p", "--scheme", "w4a16", "--model", tmp_path / "q")
    assert "is quantised already" in message


def test_a_model_without_a_tokenizer_calibrates_by_itself(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "m"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_bytes((tiny_model / name).read_bytes())
    text = tmp_path / "own.txt"
    text.write_text(TEXT)
    arguments = ["--scheme", "nvfp4", "--model", model]
    message = failure("quantize", tmp_path / "q", *arguments, "--calibration", text)
    assert "tokenizer.json" in message
    assert mortise("quantize", tmp_path / "q", *arguments).code == 0


def test_help_names_the_pairs() -> None:
    words = " ".join((quantize.quantize.help or "").split())
    for dialect, schemes in recipe.DIALECTS.items():
        listed = ", ".join(schemes[:-1]) + (" and " if schemes[1:] else "") + schemes[-1]
        assert f"{dialect} stores {listed}" in words
