"""The shipped model runs straight after installation, and is as good as its card says.

Nothing stands in for it here: without the model in the package these tests fail.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from mortise import LLM, SamplingParams
from mortise.checkpoint import builtin_model_path
from mortise.evaluation.texts import NGRAMS_FILE, TEXT_FILE, held_out_directory
from tests.cli.command_line import mortise

MAX_BYTES = 25 * 1024 * 1024
PROMPT = "def fibonacci(n):"


def test_it_is_small_enough_to_be_shipped_and_says_what_it_is() -> None:
    files = {path.name: path.stat().st_size for path in builtin_model_path().iterdir()}
    shipped = sum(path.stat().st_size for path in held_out_directory().iterdir())
    assert sum(files.values()) + shipped <= MAX_BYTES
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE"} <= set(
        files
    )
    assert {TEXT_FILE, NGRAMS_FILE} <= {path.name for path in held_out_directory().iterdir()}


def test_the_first_command_of_the_readme_completes_its_prompt() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MORTISE_")}
    outcome = subprocess.run(
        [sys.executable, "-m", "mortise", "generate", PROMPT],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    # Nobody seeds it, so that only what no chance can change is asserted.
    assert outcome.stdout.startswith(PROMPT)
    assert outcome.stdout.removeprefix(PROMPT).removesuffix("\n")


def test_what_it_writes_looks_like_python_for_most_seeds() -> None:
    llm = LLM()
    recommended = replace(llm.default_sampling, max_tokens=48)
    seeded = [replace(recommended, seed=seed) for seed in range(32)]
    completions = llm.generate([PROMPT] * len(seeded), seeded)
    texts = [completion.text or "" for completion in completions]
    # Python, by its looks: an indented line follows, and every byte belongs to a character.
    readable = [
        text
        for text in texts
        if re.match(r"\n+ {4}\S", text) and "\N{REPLACEMENT CHARACTER}" not in text
    ]
    # A model that knows nothing begins no such line, and this one did so for 512 seeds of 512: the
    # bound leaves room for a machine that rounds otherwise and chooses otherwise in consequence.
    assert len(readable) >= 16, texts


def test_the_last_token_of_a_prompt_is_healed_unless_told_otherwise() -> None:
    arguments = ("generate", PROMPT, "--temperature", "0", "--max-tokens", "4", "--json")
    (healed,) = mortise(*arguments).document["completions"]
    (plain,) = mortise(*arguments, "--no-token-healing").document["completions"]
    assert [*healed["prompt_token_ids"], healed["healed_token_id"]] == plain["prompt_token_ids"]
    assert plain["healed_token_id"] is None
    assert healed["text"].startswith("\n    ")
    assert not plain["text"].startswith("\n")


def test_it_is_found_sound() -> None:
    checks = {check["name"]: check for check in mortise("doctor", "--json").document["checks"]}
    assert checks["built-in model"]["verdict"] == "ok"


def test_it_continues_python_better_than_chance() -> None:
    prompts = ["import os\nimport", "class A:\n    def __init__(self"]
    module, method = LLM().generate(prompts, SamplingParams(max_tokens=4))
    assert module.text is not None
    assert module.text.split()[0] in sys.stdlib_module_names
    assert method.text is not None
    assert method.text[0] in ",)"


def test_it_beats_the_baselines_on_texts_it_never_saw() -> None:
    document = mortise("eval", "--documents", "8", "--json").document
    own, unigram, bigram = (score["bits_per_byte"] for score in document["scores"])
    assert own < bigram < unigram


@pytest.mark.slow
def test_its_card_tells_the_perplexity_that_is_measured() -> None:
    card = (builtin_model_path() / "README.md").read_text(encoding="utf-8")
    row = re.search(
        r"^\| selected keys, (\d+) tokens a window \| ([\d.]+) \| ([\d.]+) \|$", card, re.MULTILINE
    )
    assert row, "the card lists no perplexity of the model as published"
    outcome = mortise("eval", "--window", row[1], "--dtype", "float32", "--json")
    document = json.loads(outcome.stdout)
    own, unigram, bigram = document["scores"]
    assert own["perplexity"] == pytest.approx(float(row[2]), abs=0.02)
    assert own["bits_per_byte"] == pytest.approx(float(row[3]), abs=0.002)
    for name, score in (("unigram", unigram), ("bigram", bigram)):
        listed = re.search(rf"^\| {name} \([^|]+\) \| ([\d.]+) \|", card, re.MULTILINE)
        assert listed
        assert score["perplexity"] == pytest.approx(float(listed[1]), abs=0.02)
