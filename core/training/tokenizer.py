"""Trains the byte-level BPE tokenizer of the small model, in the Hugging Face layout.

    python -m training.tokenizer CORPUS/train.jsonl OUTPUT

Text survives encoding and decoding unchanged: there is no normalizer. The beginning-of-sentence
token is added by the post-processor, as DeepSeek's own tokenizer.json does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from training.corpus import read_jsonl

if TYPE_CHECKING:
    from collections.abc import Iterable

VOCAB_SIZE: Final = 4096
BOS: Final = "<|begin_of_sentence|>"
EOS: Final = "<|end_of_sentence|>"
PAD: Final = "<|pad|>"
BOS_ID: Final = 0
EOS_ID: Final = 1

# Qwen2's split: a run of spaces keeps its last one for the word after it, line ends stand apart
# from the indentation that follows, and digits come one at a time.
SPLIT_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def new_tokenizer() -> Tokenizer:
    """Return the untrained tokenizer: split, bytes, merges; decoding is the exact inverse."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Return a tokenizer of exactly `vocab_size` entries, special tokens first, trained on `texts`.

    Raises:
        ValueError: the texts are too few for that many entries.
    """
    tokenizer = new_tokenizer()
    specials = [AddedToken(content, special=True) for content in (BOS, EOS, PAD)]
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the texts give only {tokenizer.get_vocab_size()} entries, not {vocab_size}"
        )
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS}:1 $B:1",
                special_tokens=[(BOS, BOS_ID)],
            ),
        ]
    )
    return tokenizer


def tokenizer_config(model_max_length: int) -> dict[str, object]:
    """Return the contents of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
    }


def save(tokenizer: Tokenizer, output: Path, model_max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json into the directory `output`."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output / "tokenizer.json"))
    config = json.dumps(tokenizer_config(model_max_length), indent=2)
    (output / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")


@click.command()
@click.argument("train_jsonl", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--model-max-length", default=2048, show_default=True)
def main(train_jsonl: Path, output: Path, model_max_length: int) -> None:
    """Train on TRAIN_JSONL and write the tokenizer's two files into OUTPUT."""
    tokenizer = train(text for _, text in read_jsonl(train_jsonl))
    save(tokenizer, output, model_max_length)
    click.echo(f"{tokenizer.get_vocab_size()} entries written to {output}")


if __name__ == "__main__":
    main()
