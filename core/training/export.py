"""Writes a trained model as a Hugging Face directory, measures it, and fills in its model card.

    python -m training.export WORK OUTPUT [--run NAME] [--held-out DIRECTORY]

WORK holds what the other scripts wrote: corpus/, tokenizer/, data/, baselines/ and the run.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import torch
from safetensors.torch import load_file

from mortise.checkpoint.save import save_checkpoint, write_json
from mortise.evaluation.texts import NGRAMS_FILE, TEXT_FILE
from mortise.models.decoder_weights import decoder_placements
from mortise.models.nextn import nextn_placements
from training import checkpoints
from training.card import model_card
from training.data import load_tokens
from training.drafting import acceptance
from training.evaluate import evaluate
from training.language_model import LanguageModel
from training.recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mortise.checkpoint.placement import Placement

REPOSITORY: Final = Path(__file__).parents[2]
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json")
RECOMMENDED_SAMPLING: Final = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "token_healing": True,
}
"""A model this small repeats itself when the likeliest token is always taken, and it has seen too
little to go on where a prompt ends within what is usually one token, such as `):` and a line break.
"""

KEPT_IN_FLOAT32: Final = "e_score_correction_bias"


def new_model(recipe: Recipe) -> LanguageModel:
    """Return the published model, its parameters not filled yet, computing in float32."""
    return LanguageModel(recipe.model, has_indexer=True, compute_dtype=torch.float32)


def all_placements(model: LanguageModel) -> Iterator[Placement]:
    """Yield every tensor of the main model and of the MTP layer under the hub's names."""
    main = model.main
    yield from decoder_placements(main.model, main.lm_head, main.context.schemes)
    yield from nextn_placements(model.mtp)


def published_tensors(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Return the tensors to store by name: bfloat16, the routers' biases float32."""
    tensors = {}
    for placement in all_placements(model):
        is_exact = placement.name.endswith(KEPT_IN_FLOAT32)
        dtype = torch.float32 if is_exact else torch.bfloat16
        tensors[placement.name] = placement.target.detach().to(dtype).contiguous().clone()
    return tensors


@torch.no_grad()
def fill(model: LanguageModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill a model from stored tensors, every one of them and no other."""
    targets = {placement.name: placement.target for placement in all_placements(model)}
    assert targets.keys() == tensors.keys(), targets.keys() ^ tensors.keys()
    for name, target in targets.items():
        target.copy_(tensors[name])


def generation_config(recipe: Recipe) -> dict[str, Any]:
    """Return generation_config.json: where a text begins and ends, and how to sample between."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {**{name: recipe.model[name] for name in names}, **RECOMMENDED_SAMPLING}


def write_licences(output: Path) -> None:
    """Write the licence of the weights, and that of the text they were trained on."""
    shutil.copyfile(REPOSITORY / "LICENSE", output / "LICENSE")
    python = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    shutil.copyfile(python, output / "LICENSE.PSF")


def write_model(recipe: Recipe, state: Mapping[str, Any], tokenizer: Path, output: Path) -> None:
    """Write everything but the model card."""
    model = new_model(recipe)
    model.load_state_dict(state["model"])
    save_checkpoint(output, published_tensors(model), recipe.model)
    write_json(output / "generation_config.json", generation_config(recipe))
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, output / name)
    write_licences(output)


def write_held_out(work: Path, output: Path) -> None:
    """Write what `mortise eval` reads: the held-out texts and the counts of the baselines."""
    output.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(work / "corpus" / "held_out.jsonl", output / TEXT_FILE)
    shutil.copyfile(work / "baselines" / NGRAMS_FILE, output / NGRAMS_FILE)


def read_log(file: Path) -> list[dict[str, Any]]:
    """Return the entries of a run's log."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def facts(
    work: Path, run: Path, recipe: Recipe, model: LanguageModel, output: Path
) -> dict[str, Any]:
    """Return everything that the model card states: data, recipe, log, measures."""
    context = model.config.max_position_embeddings
    lengths = recipe.stages[-1].sequence_length, context
    held_out = load_tokens(work / "data" / "held_out.bin")
    ngrams = work / "baselines" / NGRAMS_FILE
    return {
        "corpus": json.loads((work / "corpus" / "corpus.json").read_text(encoding="utf-8")),
        "data": json.loads((work / "data" / "data.json").read_text(encoding="utf-8")),
        "recipe": recipe.model_dump(),
        "log": read_log(run / "log.jsonl"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "measures": {
            **evaluate(model, work / "data", ngrams, lengths),
            "drafting": acceptance(output, held_out, context),
        },
    }


@click.command()
@click.argument("work", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--run", "run_name", default="run", show_default=True, help="Run below WORK.")
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("recipe.toml"),
)
@click.option(
    "--held-out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also write there the texts and counts that `mortise eval` reads.",
)
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
def main(
    work: Path, output: Path, run_name: str, recipe_file: Path, held_out: Path | None, threads: int
) -> None:
    """Export the latest checkpoint of the run WORK/RUN into OUTPUT, which must not hold weights."""
    torch.set_num_threads(threads)
    recipe = read_recipe(recipe_file)
    run = work / run_name
    state = checkpoints.read(run / checkpoints.CHECKPOINT)
    write_model(recipe, state, work / "tokenizer", output)
    if held_out is not None:
        write_held_out(work, held_out)
    model = new_model(recipe)
    # What is measured is what was written, after rounding to bfloat16.
    fill(model, load_file(output / "model.safetensors"))
    known = facts(work, run, recipe, model, output)
    write_json(run / "facts.json", known)
    (output / "README.md").write_text(model_card(known), encoding="utf-8")
    click.echo(json.dumps(known["measures"], indent=2))


if __name__ == "__main__":
    main()
