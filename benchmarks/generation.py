"""Tokens per second beside Hugging Face transformers: one checkpoint, one process, in turn."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.report import report, save
from mortise import LLM, EngineConfig, SamplingParams
from mortise.checkpoint import Tokenizer, builtin_model_path
from mortise.evaluation.texts import TEXT_FILE, held_out_directory, read_documents

if TYPE_CHECKING:
    from collections.abc import Callable

    Prompts = list[list[int]]
    Engine = Callable[[Prompts, int], Prompts]
    """Continues each prompt by so many tokens, greedily."""

PROMPT_TOKENS = 256
NEW_TOKENS = 64
BATCHES = (1, 8)
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Seconds:
    """One round of one engine: prompts up to the first token, then all further tokens."""

    prefill: float
    decode: float


def mortise_engine(model: str, dtype: str) -> Engine:
    """Generate through the whole engine: scheduler, pages, sampler."""
    llm = LLM(EngineConfig(model=model, dtype=dtype, scheduler={"max_num_batched_tokens": 2048}))

    def generate(prompts: Prompts, new_tokens: int) -> Prompts:
        sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
        return [list(completion.token_ids) for completion in llm.generate(prompts, sampling)]

    return generate


def transformers_engine(model: str, dtype: str) -> Engine:
    """Generate through ``transformers``' own loop and dynamic cache."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def generate(prompts: Prompts, new_tokens: int) -> Prompts:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                token_healing=False,  # whatever the checkpoint recommends: these are token ids
                pad_token_id=0,
            )
        return [row[len(prompts[0]) :] for row in out.tolist()]

    return generate


def seconds(generate: Engine, prompts: Prompts) -> Seconds:
    """One round: one token, then as many more as are measured."""
    begin = time.perf_counter()
    generate(prompts, 1)
    first = time.perf_counter()
    generate(prompts, 1 + NEW_TOKENS)
    end = time.perf_counter()
    prefill = first - begin
    return Seconds(prefill, max(end - first - prefill, 1e-9))


def compare(
    model: str, dtype: str, prompts_of: Callable[[int], Prompts], rounds: int
) -> list[dict[str, Any]]:
    """Both engines on each batch size, round by round in turn; one row a phase and batch."""
    engines = {
        "mortise": mortise_engine(model, dtype),
        "transformers": transformers_engine(model, dtype),
    }
    rows = []
    for batch in BATCHES:
        prompts = prompts_of(batch)
        same = [engine(prompts, 16) for engine in engines.values()]
        found: dict[str, list[Seconds]] = {name: [] for name in engines}
        for _, (name, engine) in itertools.product(range(rounds), engines.items()):
            found[name].append(seconds(engine, prompts))
        tokens = {"prefill": batch * PROMPT_TOKENS, "decode": batch * NEW_TOKENS}
        for phase, count in tokens.items():
            ours, theirs = (
                [getattr(one, phase) for one in found[name]] for name in ("mortise", "transformers")
            )
            rows.append(
                {
                    "phase": phase,
                    "batch": batch,
                    "dtype": dtype,
                    "mortise_tokens_per_second": round(count / median(ours), 1),
                    "transformers_tokens_per_second": round(count / median(theirs), 1),
                    "median_ratio": round(
                        median(b / a for a, b in zip(ours, theirs, strict=True)), 2
                    ),
                    "same_first_16_tokens": same[0] == same[1],
                    "rounds": rounds,
                }
            )
    return rows


def held_out_prompts(model: str) -> Callable[[int], Prompts]:
    """Prompts cut from the held-out text, so that routing is that of real text."""
    tokenizer = Tokenizer.load(builtin_model_path() if model == "builtin" else model)
    documents = read_documents(held_out_directory() / TEXT_FILE)
    stream = [token for document in documents for token in document.token_ids(tokenizer)]

    def prompts(batch: int) -> Prompts:
        stride = len(stream) // batch
        return [stream[place * stride :][:PROMPT_TOKENS] for place in range(batch)]

    return prompts


def show(rows: list[dict[str, Any]]) -> None:
    """The comparison as a table."""
    table = Table(title="tokens per second, median of rounds")
    for heading in ("phase", "batch", "dtype", "mortise", "transformers", "ratio"):
        table.add_column(heading, justify="left" if heading in ("phase", "dtype") else "right")
    for row in rows:
        table.add_row(
            row["phase"],
            str(row["batch"]),
            row["dtype"],
            f"{row['mortise_tokens_per_second']:,.0f}",
            f"{row['transformers_tokens_per_second']:,.0f}",
            f"{row['median_ratio']:.2f}x",
        )
    Console().print(table)


@click.command()
@click.option("--model", default="builtin", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True)
@click.option("--save", "keep", is_flag=True, help="Keep the result with its date.")
def main(model: str, rounds: int, threads: int, as_json: bool, keep: bool) -> None:
    """Measure prefill and decode, batch 1 and 8."""
    torch.set_num_threads(threads)
    path = str(builtin_model_path()) if model == "builtin" else model
    prompts_of = held_out_prompts(model)
    rows = [row for dtype in DTYPES for row in compare(path, dtype, prompts_of, rounds)]
    command = f"python -m benchmarks.generation --rounds {rounds} --threads {threads}"
    text = report(
        command,
        [],
        {
            "model": "builtin" if model == "builtin" else "a directory",
            "threads": threads,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
            "comparison": rows,
        },
    )
    if as_json:
        click.echo(text)
    else:
        show(rows)
    if keep:
        click.echo(f"kept in {save('generation', text).name}", err=True)


if __name__ == "__main__":
    main()
