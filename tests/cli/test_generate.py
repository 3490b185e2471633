"""``mortise generate``: text on standard output, everything else on standard error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from mortise import LLM, SamplingParams
from mortise.cli import command_tree
from tests.cli.command_line import mortise

if TYPE_CHECKING:
    from pathlib import Path

    from mortise import Completion

PROMPT = "def f(x):"


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> list[Completion]:
    return LLM(model=tiny_model).generate([PROMPT, "ab", "cd"], SamplingParams(max_tokens=6))


def text_of(completion: Completion) -> str:
    assert completion.prompt is not None
    assert completion.text is not None
    return completion.prompt + completion.text


def test_the_text_continues_the_prompt(builtin: Path, expected: list[Completion]) -> None:
    outcome = mortise("generate", PROMPT, "--max-tokens", "6")
    assert outcome.code == 0
    assert outcome.stdout == text_of(expected[0]) + "\n"
    assert outcome.stderr.startswith("load ")
    assert "prompt 9 tokens | first token" in outcome.stderr
    assert "generated 6 tokens" in outcome.stderr
    assert "tokens/s | reference on cpu, float32 | ended by length\n" in outcome.stderr


def test_only_the_completion_and_nothing_else(builtin: Path, expected: list[Completion]) -> None:
    outcome = mortise("generate", PROMPT, "--max-tokens", "6", "--no-echo", "--quiet")
    assert (outcome.stdout, outcome.stderr) == (f"{expected[0].text}\n", "")


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_standard_input_is_the_prompt(
    builtin: Path, expected: list[Completion], arguments: list[str]
) -> None:
    outcome = mortise("generate", *arguments, "--max-tokens", "6", stdin=PROMPT)
    assert outcome.stdout == text_of(expected[0]) + "\n"


def test_standard_input_that_is_no_text_is_refused(builtin: Path) -> None:
    outcome = mortise("generate", "-", stdin=b"ab\xff")
    assert outcome.code == 2
    assert "standard input is not UTF-8 text: byte 2" in outcome.stderr


def test_several_prompts_are_printed_in_their_order(
    builtin: Path, expected: list[Completion]
) -> None:
    outcome = mortise("generate", PROMPT, "--prompt", "ab", "--prompt", "cd", "--max-tokens", "6")
    assert outcome.stdout == "\n".join(text_of(completion) + "\n" for completion in expected)
    assert "generated 18 tokens" in outcome.stderr


def test_a_file_of_prompts(builtin: Path, tmp_path: Path, expected: list[Completion]) -> None:
    ids = list(expected[2].prompt_token_ids)
    lines = [json.dumps(PROMPT), json.dumps({"prompt": "ab"}), "", json.dumps({"token_ids": ids})]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines))
    outcome = mortise("generate", "--prompts-file", file, "--max-tokens", "6", "--no-echo")
    assert outcome.stdout == "\n".join(f"{completion.text}\n" for completion in expected)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ('{"prompt": 5}', 'line 2: holds {"prompt": 5}'),
        ('{"prompt": "a", "seed": 1}', "line 2: holds"),
        ('{"token_ids": [1, true]}', "line 2: holds"),
        ('{"token_ids": []}', "a prompt is []"),
        ("7", "line 2: holds 7"),
    ],
)
def test_a_bad_line_in_a_file_is_named(
    builtin: Path, tmp_path: Path, line: str, words: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"fine"\n{line}\n')
    outcome = mortise("generate", "--prompts-file", file)
    assert outcome.code == 2
    assert words in outcome.stderr


def test_json_is_one_document(builtin: Path, expected: list[Completion]) -> None:
    outcome = mortise(
        "generate", PROMPT, "--prompt", "ab", "--max-tokens", "6", "--logprobs", "1", "--json"
    )
    document = outcome.document
    assert outcome.stderr == ""
    assert document["schema"] == 1
    assert document["backend"] == "reference"
    assert (document["device"], document["dtype"]) == ("cpu", "float32")
    assert document["model"] == str(builtin)
    first, second = document["completions"]
    assert first["prompt"] == PROMPT
    assert first["text"] == expected[0].text
    assert first["token_ids"] == list(expected[0].token_ids)
    assert second["token_ids"] == list(expected[1].token_ids)
    assert (first["finish_reason"], first["stopped_by"]) == ("length", None)
    assert len(first["logprobs"]) == 6
    assert first["logprobs"][0]["top"][0][0] == first["token_ids"][0]
    assert first["timings"]["generated_tokens"] == 6


def test_a_seed_repeats_a_run_and_is_shown(builtin: Path) -> None:
    def run(*arguments: str) -> dict:
        options = ("--max-tokens", "12", "--temperature", "1.5", "--json")
        return mortise("generate", PROMPT, *options, *arguments).document["completions"][0]

    first = run()
    assert run("--seed", str(first["seed"]))["token_ids"] == first["token_ids"]
    assert run("--seed", "1")["token_ids"] != run("--seed", "2")["token_ids"]
    shown = mortise("generate", PROMPT, "--temperature", "1", "--seed", "5", "--max-tokens", "2")
    assert shown.stderr.endswith("ended by length | seed 5\n")


def test_stop_texts_end_the_text(builtin: Path, expected: list[Completion]) -> None:
    (completion,) = mortise(
        "generate", PROMPT, "--max-tokens", "6", "--stop", "zzz", "--stop", "\ufffd", "--json"
    ).document["completions"]
    assert expected[0].text is not None
    assert completion["text"] == expected[0].text.partition("\ufffd")[0]


def test_chat_asks_as_the_model_was_trained_and_shows_the_answer_alone(
    builtin: Path, tiny_model: Path
) -> None:
    llm = LLM(model=tiny_model)
    prompt = llm.chat_prompt([{"role": "user", "content": "Hi"}])
    (answer,) = llm.generate(prompt, SamplingParams(max_tokens=6))
    outcome = mortise("generate", "Hi", "--chat", "--max-tokens", "6")
    assert outcome.stdout == f"{answer.text}\n"


def test_token_ids_are_no_chat_message(builtin: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"token_ids": [1, 2]}')
    outcome = mortise("generate", "--chat", "--prompts-file", file)
    assert outcome.code == 2
    assert "token ids are given as a chat message: [1, 2]" in outcome.stderr


def test_without_a_tokenizer_token_ids_are_printed(
    tiny_model: Path, tmp_path: Path, expected: list[Completion]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(tiny_model / name)
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"token_ids": list(expected[0].prompt_token_ids)}))
    outcome = mortise("generate", "--model", bare, "--prompts-file", file, "--max-tokens", "6")
    assert outcome.stdout.split() == [str(token) for token in expected[0].token_ids]


def test_the_command_line_goes_before_the_file_and_the_file_before_the_default(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = tmp_path / "engine.toml"
    config.write_text(f'model = "{tiny_model}"\ndtype = "bfloat16"\n')

    def dtype(*arguments: str, **variables: str) -> str:
        options = ("generate", "x", "--max-tokens", "1", "--json")
        return mortise(*options, *arguments, **variables).document["dtype"]

    assert dtype("--config", str(config)) == "bfloat16"
    assert dtype(MORTISE_CONFIG=str(config)) == "bfloat16"
    assert dtype("--config", str(config), "--dtype", "float32") == "float32"


def test_a_deprecated_variable_warns_and_counts(builtin: Path) -> None:
    outcome = mortise("explain", "--dtype", "bfloat16", "--json", SGLANG_DEEPEP_BF16_DISPATCH="1")
    assert outcome.stderr.startswith("warning: the environment variable SGLANG_DEEPEP_BF16")
    origin = outcome.document["configuration"]["dispatch.dtype"]["origin"]
    assert origin == "environment variable SGLANG_DEEPEP_BF16_DISPATCH"


def test_on_a_terminal_the_prompt_is_dim(builtin: Path, expected: list[Completion]) -> None:
    arguments = ["generate", PROMPT, "--max-tokens", "6", "--quiet"]
    shown = CliRunner().invoke(command_tree(), arguments, color=True).stdout
    assert shown == f"\x1b[2m{PROMPT}\x1b[0m{expected[0].text}\n"
