"""A GLM-4.x model behind the engine and the command line, whole, quantised and shared."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mortise import LLM, EngineConfig, SamplingParams
from mortise.config import CacheConfig, SchedulerConfig
from tests.cli.command_line import failure, mortise
from tests.engine.rank_program import results
from tests.fixtures.launched import launch
from tests.fixtures.tiny_models import save_tiny, tiny_transformers_model

if TYPE_CHECKING:
    from pathlib import Path

SCHEMES = ("fp8-block", "w8a8")
PROMPTS = ["def add(a, b):", "x", "import os\nimport sys\n" * 4, "class A:\n    pass\n"]
GREEDY = SamplingParams(max_tokens=24)
SHAPE: dict[str, Any] = {"model_type": "glm4_moe", "n_group": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, and what the command line makes of it in each scheme."""
    folder = tmp_path_factory.mktemp("glm4")
    found = {"plain": save_tiny(folder / "plain", **SHAPE)}
    for scheme in SCHEMES:
        arguments = ("--model", found["plain"], "--scheme", scheme)
        outcome = mortise("quantize", folder / scheme, *arguments)
        assert outcome.code == 0, outcome.stderr
        found[scheme] = folder / scheme
    return found


def llm_of(path: Path, *, pages: int = 64, seqs: int = 8, tokens: int = 512) -> LLM:
    return LLM(
        EngineConfig(
            model=path,
            dtype="float32",
            cache=CacheConfig(num_pages=pages),
            scheduler=SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens),
        )
    )


@pytest.fixture(scope="module")
def llm(models: dict[str, Path]) -> LLM:
    return llm_of(models["plain"])


@pytest.fixture(scope="module")
def greedy(llm: LLM) -> list[tuple[int, ...]]:
    """The tokens of every prompt, each run by itself."""
    return [llm.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]


def test_greedy_tokens_are_those_of_transformers(llm: LLM, greedy: list[tuple[int, ...]]) -> None:
    oracle = tiny_transformers_model(**SHAPE)
    for prompt, found in zip(PROMPTS, greedy, strict=True):
        ids = torch.tensor([llm.tokenizer.encode(prompt)])
        expected = oracle.generate(ids, max_new_tokens=24, do_sample=False)
        assert list(found) == expected[0, ids.shape[1] :].tolist()


def test_batched_equals_single(llm: LLM, greedy: list[tuple[int, ...]]) -> None:
    assert [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)] == greedy


def test_chunked_and_preempted_equals_whole(
    models: dict[str, Path], greedy: list[tuple[int, ...]]
) -> None:
    small = llm_of(models["plain"], pages=3, seqs=3, tokens=7)
    completions = small.generate(PROMPTS, GREEDY)
    assert [completion.token_ids for completion in completions] == greedy


def test_preempted_equals_undisturbed(llm: LLM, models: dict[str, Path]) -> None:
    prompts, params = ["a" * 50, "b" * 50, "c" * 50], SamplingParams(max_tokens=90)
    generation = llm_of(models["plain"], pages=5).stream(prompts, params)
    found = [completion.token_ids for completion in generation.completions()]
    assert sum(request.num_preemptions for request in generation._requests) > 0
    assert found == [completion.token_ids for completion in llm.generate(prompts, params)]


def test_the_cache_is_as_large_as_its_rows(llm: LLM) -> None:
    # Keys and values of two heads of 16 in float32, 64 tokens a page, three layers.
    assert llm.loaded.pool.num_bytes == 64 * 64 * 3 * 2 * 2 * 16 * 4
    assert llm.loaded.facts.architecture == "glm4_moe"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_copy_generates_and_says_how_it_is_stored(
    models: dict[str, Path], llm: LLM, scheme: str
) -> None:
    options = ("--model", models[scheme], "--dtype", "float32")
    written = mortise("generate", "def add(a, b):", "--max-tokens", "8", "--json", *options)
    assert written.code == 0, written.stderr
    assert len(written.document["completions"][0]["token_ids"]) == 8
    said = mortise("explain", *options)
    assert said.code == 0, said.stderr
    stored = scheme.replace("-", "_")
    assert f"projections {stored}" in said.stdout
    assert "glm4_moe" in said.stdout
    tokens = list(range(60))
    whole, coarse = llm.logits(tokens), llm_of(models[scheme]).logits(tokens)
    correlation = torch.corrcoef(torch.stack([whole.flatten(), coarse.flatten()]))[0, 1]
    # Another model has nothing to do with this one; what is rounded is neither equal nor strange.
    assert 0.95 < correlation < 0.99999


def test_perplexity_of_a_text(models: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("def f(x):\n    return x\n")
    document = mortise("eval", text, "--model", models["plain"], "--json").document
    assert document["scores"][0]["perplexity"] > 1


def test_a_broken_configuration_is_one_message(models: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((models["plain"] / "config.json").read_text(encoding="utf-8"))
    config["num_key_value_heads"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    message = failure("generate", "x", "--model", tmp_path)
    assert "num_attention_heads 6 is not a multiple of num_key_value_heads 4" in message


def test_two_processes_that_share_the_experts_give_the_tokens_of_one(
    models: dict[str, Path], tmp_path: Path
) -> None:
    low_latency = {
        "dispatch": {"mode": "low_latency", "max_tokens_per_rank": 64},
        "scheduler": {"max_num_batched_tokens": 48},
    }
    cases: list[dict[str, Any]] = [
        {"config": {"model": str(models[name]), "dtype": "float32", **exchange}, "num_prompts": 4}
        for name, exchange in (
            ("plain", {}),
            ("plain", low_latency),
            *((scheme, {}) for scheme in SCHEMES),
        )
    ]
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases), encoding="utf-8")
    ended = launch([["-m", "tests.engine.rank_program", "cases", str(file)]] * 2)
    assert [one.code for one in ended] == [0, 0], ended[0].stderr
    *found, _ = json.loads(ended[0].stdout)
    for case, shared in zip(cases, found, strict=True):
        alone = results(LLM(EngineConfig(**case["config"])), 4)
        assert shared["tokens"] == [list(tokens) for tokens in alone["tokens"]], case
        torch.testing.assert_close(
            torch.tensor(shared["last"]), torch.tensor(alone["last"]), rtol=1e-4, atol=1e-4
        )
