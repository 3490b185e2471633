"""How many drafts the engine accepts while it continues held-out texts.

    python -m training.drafting [MODEL]

Measures a model directory, or the built-in model, on the held-out texts that Mortise ships.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, Final

import click
import numpy as np

from mortise import LLM, EngineConfig, SamplingParams
from mortise.checkpoint import ModelDirectory, Tokenizer
from mortise.evaluation.texts import TEXT_FILE, held_out_directory, read_documents
from training.baselines import documents

if TYPE_CHECKING:
    from pathlib import Path

    from mortise import Completion
    from training.data import TokenIds

NUM_DRAFTS: Final = (1, 2, 3, 4)
NUM_PROMPTS: Final = 200
LENGTH: Final = 64
"""Tokens of a prompt, and as many new ones."""
BATCH: Final = 8


def prompts(tokens_N: TokenIds, length: int, count: int = NUM_PROMPTS) -> list[list[int]]:
    """Return prompts of `length` tokens, none of which overlap, from all over the documents.

    Args:
        tokens_N: documents, each `bos text eos`.
        length: tokens of each prompt.
        count: prompts at most.
    """
    found = [
        document[start : start + length].tolist()
        for document in documents(tokens_N)
        for start in range(0, len(document) - length, length)
    ]
    places = np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)
    return [found[place] for place in places]


def acceptance(
    model: str | Path,
    tokens_N: TokenIds,
    context: int,
    num_drafts: tuple[int, ...] = NUM_DRAFTS,
) -> dict[str, Any]:
    """Return what becomes of the drafts, for each number of tokens drafted a step.

    A model that says the likeliest token repeats itself, which is easy to foretell; therefore both
    that and the sampling that ``generation_config.json`` recommends are measured.

    Args:
        model: directory of a model with a multi-token prediction layer; computes in float32.
        tokens_N: held-out documents, each `bos text eos`.
        context: positions that the model knows.
        num_drafts: numbers of tokens drafted a step.
    """
    length = min(LENGTH, context // 4)
    wanted = prompts(tokens_N, length)
    return {
        "prompts": len(wanted),
        "prompt_tokens": length,
        "new_tokens": length,
        "drafts": [
            {"num_tokens": num_tokens, **_accepted(model, wanted, length, num_tokens)}
            for num_tokens in num_drafts
        ],
    }


def _accepted(
    model: str | Path, wanted: list[list[int]], new_tokens: int, num_tokens: int
) -> dict[str, Any]:
    llm = LLM(
        EngineConfig(
            model=model,
            dtype="float32",
            draft={"num_tokens": num_tokens},
            scheduler={"max_num_seqs": BATCH},
        )
    )
    greedy = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    drawn = replace(llm.default_sampling, max_tokens=new_tokens, ignore_eos=True)
    return {
        "greedy": _totals(llm.generate(wanted, greedy)),
        "recommended": _totals(
            llm.generate(wanted, [replace(drawn, seed=seed) for seed in range(len(wanted))])
        ),
    }


def _totals(completions: list[Completion]) -> dict[str, Any]:
    total = reduce(add, [one.drafting for one in completions if one.drafting is not None])
    return {
        "steps": total.steps,
        "accepted_by_place": [accepted / total.steps for accepted in total.accepted_by_place],
        "acceptance_length": total.acceptance_length,
    }


def shipped_texts(model: Path) -> TokenIds:
    """Return the held-out texts that Mortise ships, as a model's tokenizer reads them."""
    tokenizer = Tokenizer.load(model)
    texts = read_documents(held_out_directory() / TEXT_FILE)
    return np.array(
        [token for text in texts for token in text.token_ids(tokenizer)], dtype=np.uint16
    )


@click.command()
@click.argument("model", default="builtin")
def main(model: str) -> None:
    """Measure a model directory, or the built-in model."""
    directory = ModelDirectory.open(model)
    context = directory.config["max_position_embeddings"]
    found = acceptance(directory.path, shipped_texts(directory.path), context)
    click.echo(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
