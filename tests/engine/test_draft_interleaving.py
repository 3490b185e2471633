"""Models that draft side by side: quantised main with unquantised draft, and the reverse."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from mortise import LLM, EngineConfig, SamplingParams
from tests.cli.command_line import mortise
from tests.fixtures.drafted_models import held_out_prompts, save_drafted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mortise.engine.speculative.acceptance import Proposal

SCHEMES = ("fp8-block", "w8a8", "w4a16", "nvfp4")
NUM_DRAFTS = 2
STEPS = 10


class Done(NamedTuple):
    """Everything that a model said."""

    tokens: list[tuple[int, ...]]
    logprobs: list[object]
    drafts: list[tuple[int, ...]]
    logits: list[torch.Tensor]
    """Of one sequence, and of what was drafted from."""

    def equals(self, other: Done) -> bool:
        """To the last bit."""
        return self[:3] == other[:3] and all(map(torch.equal, self.logits, other.logits))


class Drafts:
    """What an engine drafts, noted as it goes."""

    def __init__(self, llm: LLM) -> None:
        self.token_ids: list[tuple[int, ...]] = []
        self.weights: list[torch.Tensor] = []
        self._drafter = llm._engine._stepper._drafter
        self._propose = self._drafter.propose
        self._drafter.propose = self._noting

    def _noting(self, *arguments: Any) -> list[Proposal]:
        proposals = self._propose(*arguments)
        self.token_ids += [one.token_ids for one in proposals]
        self.weights += [one.weights_KV for one in proposals if one.weights_KV is not None]
        return proposals

    def stop(self) -> None:
        """Leave the engine as it was."""
        self._drafter.propose = self._propose


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_drafted(
        tmp_path_factory.mktemp("plain") / "model", dtype=torch.bfloat16, chance=0.1
    )


@pytest.fixture(scope="module")
def quantised(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """For each scheme a model whose main part alone is quantised, and one that is so altogether."""
    found = {}
    for scheme in SCHEMES:
        folder = tmp_path_factory.mktemp(scheme)
        for name, draft in (("main", "none"), ("both", scheme)):
            schemes = ("--scheme", scheme, "--draft-scheme", draft)
            outcome = mortise("quantize", folder / name, "--model", plain, *schemes)
            assert outcome.code == 0, outcome.stderr
        found[scheme] = {"main": folder / "main", "both": folder / "both"}
    return found


def load(model: Path, draft: Path) -> LLM:
    config = {"num_tokens": NUM_DRAFTS, "model": draft}
    return LLM(EngineConfig(model=model, draft=config, cache={"num_pages": 24}))


def run(llms: Sequence[LLM]) -> list[Done]:
    """Greedy and drawn prompts of each model, the steps of all of them mixed."""
    prompts = held_out_prompts(llms[0].tokenizer, 8)[4:]
    sampling = [
        SamplingParams(
            max_tokens=STEPS, ignore_eos=True, logprobs=1, temperature=number % 2, seed=5
        )
        for number in range(len(prompts))
    ]
    notes = [Drafts(llm) for llm in llms]
    streams = [llm.stream(prompts, sampling) for llm in llms]
    for _ in range(STEPS * len(prompts)):
        for stream in streams:
            next(stream, None)
    found = []
    for llm, stream, drafts in zip(llms, streams, notes, strict=True):
        done = stream.completions()
        drafts.stop()
        assert all(one.drafting is not None and one.drafting.steps for one in done)
        found.append(
            Done(
                [one.token_ids for one in done],
                [one.logprobs for one in done],
                drafts.token_ids,
                [llm.logits(prompts[0]), *drafts.weights],
            )
        )
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_interleaved_they_are_bit_identical_to_each_alone(
    plain: Path, quantised: dict[str, dict[str, Path]], scheme: str
) -> None:
    """In both directions and in every order of loading, each with two roles of its own."""
    paths = {
        "quantised main, plain draft": (quantised[scheme]["main"], quantised[scheme]["main"]),
        "plain main, quantised draft": (plain, quantised[scheme]["both"]),
        "both quantised": (quantised[scheme]["both"], quantised[scheme]["both"]),
    }
    alone = {name: run([load(*pair)])[0] for name, pair in paths.items()}
    assert not any(one.equals(other) for one, other in permutations(alone.values(), 2))
    for order in (*permutations(list(paths)[:2]), tuple(paths), tuple(paths)[::-1]):
        together = run([load(*paths[name]) for name in order])
        for name, done in zip(order, together, strict=True):
            assert done.equals(alone[name]), f"{name} of {order}"


@pytest.mark.parametrize("scheme", ["w8a8", "nvfp4"])
def test_a_model_that_is_gone_leaves_the_other_as_it_was(
    plain: Path, quantised: dict[str, dict[str, Path]], scheme: str
) -> None:
    kept = load(plain, quantised[scheme]["both"])
    (before,) = run([kept])
    other = load(quantised[scheme]["main"], plain)
    assert run([other, kept])[1].equals(before)
    del other
    assert run([kept])[0].equals(before)
