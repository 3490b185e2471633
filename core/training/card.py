"""The model card, filled from what was measured."""

from __future__ import annotations

import math
from typing import Any, Final

CURVE_ROWS: Final = 12

CARD: Final = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
tags: [deepseek_v32, mixture-of-experts, sparse-attention, python]
---

# stdlib-10m

A DeepSeek-V3.2 in miniature: latent attention, lightning indexer, routed and shared experts and
one multi-token prediction layer in {parameters:,} parameters, trained on the sources and the
documentation of the Python standard library. It comes with Mortise so that every part of the
engine can be run on weights that were really trained.

**What it is not.** It is not a coding assistant. It knows nothing but the style of one library, it
follows no instructions and has no chat template; what it writes looks like Python and is rarely
right. Do not use it for anything but trying, testing and measuring an engine.

## Data and licence

CPython 3.11's library (`.py` files; tests in part, tables and generated files left out) and
documentation (`.rst` sources as Debian's `python3.11-doc` ships them), Copyright (c) 2001 Python
Software Foundation and others, under the PSF licence in `LICENSE.PSF`. The weights are released
under Apache-2.0 (`LICENSE`).

| part | files | bytes of text | tokens |
| --- | ---: | ---: | ---: |
{data_rows}

Of the training text {library_share:.0%} is library, {documentation_share:.0%} documentation and
{test_share:.0%} tests. Held-out files were chosen by the sha256 of their path before the tokenizer
was trained, and are no copies of others. The tokenizer is a byte-level BPE of {vocab_size} entries
trained on the training part.

## Results

All numbers are measured on the whole held-out part with the published bfloat16 weights, computed
in float32. A document is `bos text eos`, cut into windows without overlap; every token but bos is
predicted once. `mortise eval` measures the first two and "selected keys" again, in the dtype it
is told to compute in.

| model | perplexity per token | bits per byte |
| --- | ---: | ---: |
{result_rows}

"Selected keys" is the model as published: each query attends to the {index_topk} keys that its
indexer ranks first. "All keys" and "{index_topk} latest keys" are the same weights with another
choice of keys.

The multi-token prediction layer guesses the token after the next one right in {mtp_accuracy:.1%}
of all cases (perplexity {mtp_perplexity:.2f}), and agrees with the main model's own greedy choice
in {mtp_agreement:.1%}, after what stands in the held-out text.

What the model itself writes is easier to foretell. With `--draft K` the layer drafts K tokens a
step, and the engine takes those that the model agrees with and one more. Measured by the engine on
{draft_prompts} held-out prompts of {draft_prompt_tokens} tokens, each continued by
{draft_new_tokens} more:

| K | first draft accepted, greedy | tokens a step | first draft accepted, sampled | tokens a step |
| ---: | ---: | ---: | ---: | ---: |
{draft_rows}

"Sampled" is the sampling that is recommended below. `python -m training.drafting` in
`core/` of Mortise's repository measures it.

## Generating

`generation_config.json` recommends sampling, since a model this small repeats itself when the
likeliest token is always taken, and token healing: the vocabulary has tokens such as `):` with the
line break after it, and after a prompt that ends within one, as `def fibonacci(n):` does, the
model would not begin a new line. transformers 5.23 fails where a file recommends that: give its
`generate` the argument `token_healing=False`.

## Training

{stage_rows}

Muon (arXiv 2502.16982) trains the matrices, AdamW the embedding, norms and router gates; bfloat16
mixed precision, gradient clipping at {clip_norm}, weight decay {weight_decay}. Expert load is
balanced without an auxiliary loss (arXiv 2408.15664). The stages follow DeepSeek-V3.2 (arXiv
2512.02556): dense attention, a warm-up of the indexers alone, training on selected keys with the
indexers' loss on detached inputs. In all {tokens:,} tokens ({epochs:.1f} passes over the data) in
{minutes:.0f} minutes on one processor core. Recipe, scripts and commands: `core/training` in
Mortise's repository.

Loss in nats per token on windows spread over the held-out part, while training:

| stage | step | tokens seen | next token | token after it | indexer (KL) |
| --- | ---: | ---: | ---: | ---: | ---: |
{curve_rows}
"""


def model_card(facts: dict[str, Any]) -> str:
    """Return the card's Markdown.

    Args:
        facts: what `training.export.facts` gathers.
    """
    recipe, corpus, data = facts["recipe"], facts["corpus"]["train"], facts["data"]
    model, optimizer, mtp = recipe["model"], recipe["optimizer"], facts["measures"]["mtp"]
    drafting = facts["measures"]["drafting"]
    last = facts["log"][-1]
    return CARD.format(
        parameters=facts["parameters"],
        vocab_size=model["vocab_size"],
        index_topk=model["index_topk"],
        data_rows="\n".join(_data_rows(facts)),
        library_share=corpus["library_bytes"] / corpus["bytes"],
        documentation_share=corpus["documentation_bytes"] / corpus["bytes"],
        test_share=corpus["test_bytes"] / corpus["bytes"],
        result_rows="\n".join(_result_rows(facts["measures"], model["index_topk"])),
        mtp_accuracy=mtp["accuracy"],
        mtp_agreement=mtp["agreement"],
        mtp_perplexity=math.exp(mtp["nats_per_token"]),
        draft_prompts=drafting["prompts"],
        draft_prompt_tokens=drafting["prompt_tokens"],
        draft_new_tokens=drafting["new_tokens"],
        draft_rows="\n".join(draft_rows(drafting)),
        stage_rows="\n".join(_stage_row(number, s) for number, s in enumerate(recipe["stages"], 1)),
        clip_norm=optimizer["clip_norm"],
        weight_decay=optimizer["weight_decay"],
        tokens=last["tokens"],
        epochs=last["tokens"] / data["train"]["tokens"],
        minutes=last["seconds"] / 60,
        curve_rows="\n".join(_curve_rows(facts["log"])),
    )


def _data_rows(facts: dict[str, Any]) -> list[str]:
    return [
        f"| {label} | {part['documents']} | {part['text_bytes']:,} | {part['tokens']:,} |"
        for label, part in (
            ("training", facts["data"]["train"]),
            ("held out", facts["data"]["held_out"]),
        )
    ]


def _result_rows(measures: dict[str, Any], topk: int) -> list[str]:
    labels = {"unigram": "unigram (add one)", "bigram": "bigram (Witten-Bell)"}
    for name in measures:
        for kind, label in (("selected", "selected"), ("all", "all"), ("recent", f"{topk} latest")):
            if name.startswith(kind):
                labels[name] = f"{label} {name.removeprefix(kind).strip()} a window"
    return [
        f"| {label} | {measures[name]['perplexity']:.2f} | {measures[name]['bits_per_byte']:.3f} |"
        for name, label in labels.items()
    ]


def draft_rows(drafting: dict[str, Any]) -> list[str]:
    """Return a row for each number of tokens drafted a step.

    Args:
        drafting: what `training.drafting.acceptance` found.
    """
    return [
        f"| {one['num_tokens']} | "
        + " | ".join(
            f"{one[kind]['accepted_by_place'][0]:.1%} | {one[kind]['acceptance_length']:.2f}"
            for kind in ("greedy", "recommended")
        )
        + " |"
        for one in drafting["drafts"]
    ]


def _stage_row(number: int, stage: dict[str, Any]) -> str:
    rate = stage["learning_rate"] if stage["kind"] != "indexer" else stage["indexer_learning_rate"]
    mtp = f", MTP loss x {stage['mtp_weight']} from step {stage['mtp_from_step']}"
    return (
        f"{number}. {stage['name']}: {stage['steps']} steps of {stage['sequences']} x "
        f"{stage['sequence_length']} tokens, learning rate {rate['peak']:g} to {rate['final']:g}"
        f"{mtp if stage['mtp_weight'] else ''}"
    )


def _curve_rows(log: list[dict[str, Any]]) -> list[str]:
    measured = [entry for entry in log if "held_out_loss" in entry]
    stride = max(1, len(measured) // CURVE_ROWS)
    shown = [entry for place, entry in enumerate(measured[::-1]) if place % stride == 0][::-1]
    names = ("held_out_loss", "held_out_mtp_loss", "held_out_index_loss")
    return [
        f"| {entry['stage']} | {entry['step']} | {entry['tokens']:,} | "
        + " | ".join(f"{entry[name]:.3f}" if name in entry else "" for name in names)
        + " |"
        for entry in shown
    ]
