"""Tokens per second with and without drafting: the built-in model, one process, in turn."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import torch

from benchmarks.generation import DTYPES, held_out_prompts
from benchmarks.report import report, save
from mortise import LLM, EngineConfig, SamplingParams
from mortise.checkpoint import builtin_model_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mortise import Completion
    from mortise.engine.speculative.statistics import DraftStatistics

    Prompts = list[list[int]]

PROMPT_TOKENS = 64
NEW_TOKENS = 64
BATCHES = (1, 8)
NUM_DRAFTS = (0, 1, 2, 3, 4)
NUM_PROMPTS = 8
"""A round; one after the other where the batch is 1."""
SAMPLINGS = ("greedy", "sampled")
"""The likeliest token, which repeats itself and is easily drafted; or as the model recommends."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round of one engine: seconds after the first tokens, and what was generated."""

    seconds: float
    token_ids: tuple[tuple[int, ...], ...]
    drafting: DraftStatistics | None


def engine(model: str, dtype: str, num_drafts: int, batch: int) -> LLM:
    """One that drafts so many tokens a step; 0 drafts none."""
    return LLM(
        EngineConfig(
            model=model,
            dtype=dtype,
            draft={"num_tokens": num_drafts},
            scheduler={"max_num_seqs": batch, "max_num_batched_tokens": 2048},
        )
    )


def sampling_of(llm: LLM, kind: str, number: int) -> SamplingParams:
    """How one prompt is continued; the number seeds it."""
    if kind == "greedy":
        return SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    return replace(llm.default_sampling, max_tokens=NEW_TOKENS, ignore_eos=True, seed=number)


def measured(llm: LLM, prompts: Prompts, batch: int, kind: str) -> Round:
    """Generate, so many prompts at a time."""
    params = [sampling_of(llm, kind, number) for number in range(len(prompts))]
    seconds, completions = 0.0, []
    for start in range(0, len(prompts), batch):
        group = slice(start, start + batch)
        begin = time.perf_counter()
        found = llm.generate(prompts[group], params[group])
        seconds += time.perf_counter() - begin - max(one.timings.first_token for one in found)
        completions += found
    return Round(seconds, tuple(one.token_ids for one in completions), drafts_of(completions))


def drafts_of(completions: Sequence[Completion]) -> DraftStatistics | None:
    """What became of all drafts together."""
    found = [one.drafting for one in completions if one.drafting is not None]
    return reduce(add, found) if found else None


def compare(
    model: str, dtype: str, batch: int, kind: str, prompts: Prompts, rounds: int
) -> list[dict[str, Any]]:
    """Every number of drafts, round by round in turn; one row each."""
    engines = {number: engine(model, dtype, number, batch) for number in NUM_DRAFTS}
    for llm in engines.values():
        llm.generate(prompts[:batch], SamplingParams(max_tokens=8, ignore_eos=True))
    found: dict[int, list[Round]] = {number: [] for number in NUM_DRAFTS}
    for _, (number, llm) in itertools.product(range(rounds), engines.items()):
        found[number].append(measured(llm, prompts, batch, kind))
    tokens = len(prompts) * (NEW_TOKENS - 1)
    plain = found[0]
    return [
        {
            "dtype": dtype,
            "batch": batch,
            "sampling": kind,
            "num_drafts": number,
            "tokens_per_second": round(tokens / median(one.seconds for one in own), 1),
            "median_ratio": round(
                median(a.seconds / b.seconds for a, b in zip(plain, own, strict=True)), 2
            ),
            "same_tokens_as_without": own[0].token_ids == plain[0].token_ids,
            "rounds": rounds,
            **acceptance(own[0].drafting),
        }
        for number, own in found.items()
    ]


def acceptance(drafting: DraftStatistics | None) -> dict[str, Any]:
    """Tokens a verify pass gave, and the share of drafts accepted at each place."""
    if drafting is None or drafting.acceptance_length is None:
        return {"acceptance_length": None, "accepted_by_place": []}
    return {
        "acceptance_length": round(drafting.acceptance_length, 3),
        "accepted_by_place": [
            round(accepted / drafting.steps, 3) for accepted in drafting.accepted_by_place
        ],
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """How fast without drafts, and how many times as fast with them; then what was accepted."""
    heads = " | ".join(f"K = {number}" for number in NUM_DRAFTS[1:])
    yield f"| dtype | batch | | no drafts, tokens/s | {heads} |"
    yield f"|---|---:|---|---:|{'---:|' * len(NUM_DRAFTS[1:])}"
    for (dtype, batch, kind), group in itertools.groupby(
        rows, key=lambda row: (row["dtype"], row["batch"], row["sampling"])
    ):
        plain, *drafted = group
        ratios = " | ".join(f"{row['median_ratio']:.2f}" for row in drafted)
        yield f"| {dtype} | {batch} | {kind} | {plain['tokens_per_second']:,.0f} | {ratios} |"
    yield ""
    yield "| | K | tokens a step | accepted at each place |"
    yield "|---|---:|---:|---|"
    for row in rows:
        if row["num_drafts"] and (row["dtype"], row["batch"]) == (DTYPES[0], BATCHES[0]):
            places = " ".join(f"{rate:.0%}" for rate in row["accepted_by_place"])
            length = f"{row['acceptance_length']:.2f}"
            yield f"| {row['sampling']} | {row['num_drafts']} | {length} | {places} |"


@click.command()
@click.option("--model", default="builtin", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True)
@click.option("--save", "keep", is_flag=True, help="Keep the result with its date.")
def main(model: str, rounds: int, threads: int, as_json: bool, keep: bool) -> None:
    """Measure generation with 0 to 4 drafts a step, batch 1 and 8."""
    torch.set_num_threads(threads)
    path = str(builtin_model_path()) if model == "builtin" else model
    prompts = [prompt[:PROMPT_TOKENS] for prompt in held_out_prompts(path)(NUM_PROMPTS)]
    rows = [
        row
        for dtype, batch, kind in itertools.product(DTYPES, BATCHES, SAMPLINGS)
        for row in compare(path, dtype, batch, kind, prompts, rounds)
    ]
    text = report(
        f"python -m benchmarks.drafting --rounds {rounds} --threads {threads}",
        [],
        {
            "model": "builtin" if model == "builtin" else "a directory",
            "threads": threads,
            "prompts": NUM_PROMPTS,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
            "comparison": rows,
        },
    )
    click.echo(text if as_json else "\n".join(markdown(rows)))
    if keep:
        click.echo(f"kept in {save('drafting', text).name}", err=True)


if __name__ == "__main__":
    main()
