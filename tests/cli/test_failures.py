"""Every failure that a user can meet ends in one message that says what, expected and remedy."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file

from mortise.testing.distributions import FakeDistribution, backend_code
from tests.cli.command_line import failure, mortise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A model directory that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeDistribution]:
    """Distributions that are installed as long as the test runs."""
    with FakeDistribution(tmp_path / "site").installed() as installed:
        yield installed


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def assert_parts(message: str, *, what: str, expected: str, remedy: str) -> None:
    """The first line says what happened; the last two what was expected and what to do."""
    lines = message.splitlines()
    assert re.search(what, lines[0]), message
    assert any(re.match(rf"  expected: .*{expected}", line) for line in lines), message
    assert any(re.match(rf"  remedy: .*{remedy}", line) for line in lines), message


def generate(model: Path, *arguments: str) -> str:
    return failure("generate", "x", "--model", model, *arguments)


# 1
def test_an_unknown_backend_brings_close_names_and_what_was_found(model: Path) -> None:
    message = generate(model, "--backend", "refrence")
    assert_parts(
        message,
        what="^error: no backend 'refrence' is installed$",
        expected="reference",
        remedy="did you mean 'reference'",
    )
    assert re.search(r"^    reference +mortise-core .* ok$", message, flags=re.MULTILINE)


# 2
def test_a_backend_whose_import_fails_says_the_root_cause_first(
    model: Path, fake: FakeDistribution
) -> None:
    code = backend_code(before="try:\n    import no_vendor_stack\nexcept ImportError as e:\n"
                               "    raise RuntimeError('no driver') from e")  # fmt: skip
    fake.add_backend("broken", code=code)
    message = generate(model, "--backend", "broken")
    first, *rest = message.splitlines()
    assert "ModuleNotFoundError: No module named 'no_vendor_stack'" in first
    assert any("which led to RuntimeError: no driver" in line for line in rest)
    assert "fake_broken" in message
    assert "mortise-broken 1.0" in message
    assert re.search(r"^  remedy: ", message, flags=re.MULTILINE)


# 3
def test_two_distributions_with_one_name_are_both_named_with_their_place(
    model: Path, fake: FakeDistribution
) -> None:
    fake.add_backend("twin", distribution="first-twin", package="twin_one")
    fake.add_backend("twin", distribution="second-twin", package="twin_two")
    message = generate(model, "--backend", "twin")
    assert_parts(
        message,
        what="2 distributions claim the backend name 'twin'",
        expected="one distribution for each name",
        remedy="uninstall all but one",
    )
    for package, distribution in (("twin_one", "first-twin"), ("twin_two", "second-twin")):
        assert f"{distribution} 1.0 ({fake.folder / package / 'backend.toml'})" in message


# 4
def test_a_backend_for_another_core_names_both_versions(
    model: Path, fake: FakeDistribution
) -> None:
    fake.add_backend("future", manifest={"engine": ">=9,<10"})
    message = generate(model, "--backend", "future")
    assert "it needs mortise-core >=9,<10, installed is 0.1.0" in message.splitlines()[0]
    assert re.search(r"^  remedy: .*install a matching mortise-core", message, flags=re.MULTILINE)


# 5
def test_a_hook_in_another_version_names_both(model: Path, fake: FakeDistribution) -> None:
    fake.add_backend("newer", manifest={"implements": {"qkv_split": 7}})
    message = generate(model, "--backend", "newer")
    assert "implements version 7 of hook qkv_split, this core has 1" in message.splitlines()[0]
    assert re.search(r"^  remedy: install a newer core", message, flags=re.MULTILINE)


# 6
@pytest.mark.parametrize("place", ["manifest", "code"])
def test_a_misspelt_hook_brings_the_one_that_was_meant(
    model: Path, fake: FakeDistribution, place: str
) -> None:
    if place == "manifest":
        fake.add_backend("typo", manifest={"implements": {"qkv_splitt": 1}})
    else:
        wrong = "@hookimpl\ndef qkv_splitt(self, projected_qkvz, projected_ba, shape): pass"
        fake.add_backend("typo", code=backend_code(wrong))
    message = generate(model, "--backend", "typo")
    assert "qkv_splitt" in message.splitlines()[0]
    assert "did you mean 'qkv_split'?" in message
    assert re.search(r"^  remedy: ", message, flags=re.MULTILINE)


# 7
def test_a_wrong_signature_is_shown_beside_the_right_one(
    model: Path, fake: FakeDistribution
) -> None:
    wrong = "@hookimpl\ndef qkv_split(self, projected_qkvz, shape): pass"
    fake.add_backend("shape", code=backend_code(wrong))
    assert_parts(
        generate(model, "--backend", "shape"),
        what="hook qkv_split has the wrong signature: parameter 'shape' stands where",
        expected=r"qkv_split\(projected_qkvz, projected_ba, shape\)",
        remedy="use these names in this order",
    )


# 8
def test_a_hook_that_is_declared_and_missing_is_named(model: Path, fake: FakeDistribution) -> None:
    fake.add_backend("empty", code=backend_code(""))
    message = generate(model, "--backend", "empty")
    assert_parts(
        message,
        what="hook qkv_split is declared in backend.toml but not implemented",
        expected="@hookimpl",
        remedy="implement it, or remove it from the manifest",
    )
    assert "mortise-empty 1.0" in message


# 9
def test_a_hook_that_returns_none_is_named_with_backend_and_layer(
    model: Path, fake: FakeDistribution
) -> None:
    fake.add_backend(
        "silent",
        manifest={"implements": {"resolve_dispatch_dtype": 1}},
        code=backend_code("@hookimpl\ndef resolve_dispatch_dtype(self, request): pass"),
    )
    message = generate(model, "--backend", "silent")
    assert_parts(
        message,
        what="hook resolve_dispatch_dtype returned None",
        expected="an answer",
        remedy="report it to the authors of mortise-silent",
    )
    assert "role main, layer model.layers.1.mlp" in message


# 10
def test_an_unknown_configuration_key_brings_the_one_that_was_meant(
    model: Path, tmp_path: Path
) -> None:
    config = tmp_path / "engine.toml"
    config.write_text("[cache]\nnum_page = 4\n")
    message = generate(model, "--config", str(config))
    assert_parts(
        message,
        what=f"unknown configuration key 'cache.num_page' .from file {re.escape(str(config))}",
        expected="cache.num_pages",
        remedy="correct or remove it",
    )
    assert "did you mean 'cache.num_pages'?" in message


# 11
def test_a_value_of_the_wrong_type_is_shown_with_the_right_one(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "engine.toml"
    config.write_text('[cache]\nnum_pages = "64"\n')
    assert_parts(
        generate(model, "--config", str(config)),
        what=r"configuration key 'cache.num_pages' is '64' \(string\)",
        expected="an integer",
        remedy="correct or remove it",
    )


# 12
def test_a_missing_model_directory_is_named_by_its_full_path(tmp_path: Path) -> None:
    message = failure("generate", "x", "--model", tmp_path / "absent")
    assert_parts(
        message,
        what="model directory '.*absent' does not exist",
        expected="a directory with config.json",
        remedy="correct the path",
    )
    assert f"looked for: {tmp_path / 'absent'}" in message


# 13
def test_an_unknown_architecture_brings_the_known_ones(model: Path) -> None:
    edit_json(model / "config.json", model_type="deepseek_v33")
    message = generate(model)
    assert_parts(
        message,
        what="unknown model_type 'deepseek_v33' in config.json",
        expected="deepseek_v3, deepseek_v32",
        remedy="use a checkpoint of a supported family",
    )
    assert "did you mean 'deepseek_v3" in message


# 14
def test_a_truncated_file_is_named_with_its_sizes(model: Path) -> None:
    weights = model / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        file.truncate(size // 2)
    message = generate(model)
    assert_parts(
        message,
        what="model.safetensors is truncated",
        expected="a complete safetensors file",
        remedy="download the file again",
    )
    assert f"size found: {size // 2} bytes" in message
    assert f"size needed: {size} bytes" in message


# 15
def test_a_missing_tensor_is_named(model: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    edit_tensors(model / "model.safetensors", lambda tensors: tensors.pop(name))
    message = generate(model)
    assert_parts(
        message,
        what="the checkpoint lacks 1 tensor that the model needs",
        expected="every tensor of the model",
        remedy=".",
    )
    assert name in message


# 16
def test_an_unexpected_tensor_is_named(model: Path) -> None:
    name = "model.layers.1.mlp.experts.99.up_proj.weight"

    def add(tensors: dict) -> None:
        tensors[name] = tensors["model.norm.weight"].clone()

    edit_tensors(model / "model.safetensors", add)
    message = generate(model)
    assert_parts(
        message,
        what="the checkpoint holds 1 tensor that the model does not",
        expected=".",
        remedy=".",
    )
    assert name in message


# 17
def test_a_prompt_longer_than_the_context_is_counted(model: Path) -> None:
    assert_parts(
        failure("generate", "x" * 600, "--model", model),
        what="the prompt has 600 tokens",
        expected="at most 511, since the model's context is 512 tokens",
        remedy="shorten the prompt",
    )
    assert_parts(
        failure("generate", "x" * 500, "--model", model, "--max-tokens", "20"),
        what="the prompt has 500 tokens and max_tokens is 20, which makes 520",
        expected="at most 512 together",
        remedy="shorten the prompt, or ask for at most 12 tokens",
    )


# 18
def test_bad_json_in_config_json_says_where(model: Path) -> None:
    (model / "config.json").write_text('{\n  "model_type": "deepseek_v3",\n}')
    message = generate(model)
    assert "config.json" in message.splitlines()[0]
    assert re.search(r"line 3", message)
    assert re.search(r"^  remedy: ", message, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "-1"], ["temperature is -1.0", "expected: a number of at least 0"]),
        (["--top-p", "1.5"], ["top_p is 1.5", "expected: a number above 0 and at most 1"]),
        (["--max-tokens", "0"], ["max_tokens is 0", "expected: an integer of at least 1"]),
        (["--dtype", "float16"], ["'dtype' is 'float16'", "command line --dtype"]),
        (["--dispatch-dtype", "fp8"], ["fp8", "model.layers.1.mlp"]),
        (["--device", "nowhere"], ["torch cannot use device 'nowhere'"]),
        (["--config", "absent.toml"], ["configuration file absent.toml does not exist"]),
        (["--prompts-file", "absent"], ["the file of prompts 'absent' cannot be read"]),
        (["--logprobs", "2"], ["--logprobs shows nothing without --json"]),
        (["--max-tokens", "ten"], ["invalid value for '--max-tokens'", "'ten'"]),
        (["--modle", "x"], ["no option '--modle'", "did you mean '--model'"]),
        (["more"], ["got unexpected extra argument"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_a_wrong_option_is_named_with_its_value(
    model: Path, arguments: list[str], words: list[str]
) -> None:
    message = generate(model, *arguments)
    for word in words:
        assert word in message


def test_a_misspelt_verb_brings_the_one_that_was_meant() -> None:
    assert_parts(
        failure("genrate"),
        what="no command 'genrate'",
        expected="backends, conformance, diff, doctor, eval, explain, generate",
        remedy="see mortise --help",
    )
    assert "did you mean 'generate'?" in failure("genrate")


def test_a_model_without_chat_template_says_so(model: Path) -> None:
    edit_json(model / "tokenizer_config.json", chat_template=None)
    assert_parts(
        failure("generate", "Hi", "--model", model, "--chat"),
        what="this model has no chat template",
        expected="chat_template",
        remedy="give a plain prompt",
    )


def test_strict_makes_a_stand_in_an_error(model: Path, fake: FakeDistribution) -> None:
    fake.add_backend("partial")
    assert_parts(
        generate(model, "--backend", "partial", "--strict"),
        what="backend 'partial' does not implement resolve_dispatch_dtype",
        expected="a backend that implements every hook",
        remedy="configure strict = false",
    )


def test_with_json_a_failure_is_a_document_on_standard_error(model: Path) -> None:
    outcome = mortise("generate", "x", "--model", model, "--backend", "refrence", "--json")
    assert (outcome.code, outcome.stdout) == (2, "")
    document = json.loads(outcome.stderr)
    assert document["schema"] == 1
    error = document["error"]
    assert error["type"] == "BackendNotFoundError"
    assert error["reason"] == "not_found"
    assert error["what"] == "no backend 'refrence' is installed"
    assert set(error) == {"type", "reason", "what", "details", "expected", "remedy"}
    usage = json.loads(mortise("generate", "--nonsense", "--json").stderr)
    assert usage["error"]["what"] == "no option '--nonsense' of 'mortise generate'"
