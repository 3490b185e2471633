"""The training run: the recipe's stages one after the other, resumed by the same command.

    python -m training.train DATA OUTPUT [--recipe RECIPE] [--threads N]

The stages are those of DeepSeek-V3.2 (arXiv 2512.02556, section 2.1.1), in small: dense training,
a warm-up of the indexers against dense attention, training on the keys they select.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import torch

from training import checkpoints, optimizer
from training.attention import DenseAttention, IndexedAttention, TrainingAttention
from training.balance import LoadBalancer
from training.checkpoints import CHECKPOINT, Progress
from training.data import Batches, TokenIds, load_tokens
from training.language_model import LanguageModel, initialise
from training.recipe import Recipe, Stage, read_recipe

if TYPE_CHECKING:
    from torch import Tensor

LOG_EVERY: Final = 10  # steps
COMPUTE_DTYPE: Final = torch.bfloat16


@dataclass(slots=True)
class Measures:
    """Sums of the losses of several passes, by name, and their number."""

    sums: dict[str, float] = field(default_factory=dict)
    passes: int = 0

    def add(self, values: dict[str, float]) -> None:
        """Add one pass."""
        self.passes += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Return the mean of each loss over the passes."""
        return {name: total / self.passes for name, total in self.sums.items()}


@dataclass(slots=True)
class Run:
    """One stage under way: what learns, from what, and how far it has come."""

    recipe: Recipe
    stage: Stage
    directory: Path
    model: LanguageModel
    optimizers: list[torch.optim.Optimizer]
    balancer: LoadBalancer
    progress: Progress
    train_N: TokenIds
    held_out_N: TokenIds

    @property
    def batches(self) -> Batches:
        """The stage's batches; each stage draws its own."""
        seed = self.recipe.seed + self.progress.stage
        return Batches(self.train_N, self.stage.sequence_length, self.stage.sequences, seed)


def attention_for(stage: Stage, sequences: int, index_topk: int) -> TrainingAttention:
    """Return the attention of one pass of a stage."""
    if stage.kind == "dense":
        return DenseAttention(sequences)
    return IndexedAttention(sequences, index_topk if stage.kind == "sparse" else None)


def run_pass(run: Run, windows: Tensor, mtp_weight: float) -> tuple[Tensor, dict[str, float]]:
    """Return the loss to minimise over windows [B, S + 2], and its parts for the log."""
    attend = attention_for(run.stage, len(windows), run.recipe.model["index_topk"])
    # The MTP layer has an indexer too, so where only indexers learn it runs as well.
    with_mtp = mtp_weight > 0 or run.stage.kind == "indexer"
    with torch.autocast("cpu", COMPUTE_DTYPE):
        losses = run.model(windows, attend, with_mtp=with_mtp)
    parts = {"loss": losses.next_token.item()}
    total = losses.next_token
    if losses.mtp is not None:
        parts["mtp_loss"] = losses.mtp.item()
        total = total + mtp_weight * losses.mtp
    if attend.index_losses:
        index_losses = torch.stack(attend.index_losses)
        parts["index_loss"] = index_losses.mean().item()
        total = total + index_losses.sum()
    return total, parts


def set_learning_rates(run: Run) -> None:
    """Give every group of parameters its rate for the coming step."""
    stage, step = run.stage, run.progress.step
    for opt in run.optimizers:
        for group in opt.param_groups:
            rate = stage.indexer_learning_rate if group["is_indexer"] else stage.learning_rate
            group["lr"] = group["rate_scale"] * rate.at(step, stage.steps)


def train_step(run: Run) -> dict[str, float]:
    """Do one step and return its measures."""
    stage, progress = run.stage, run.progress
    mtp_weight = stage.mtp_weight_at(progress.step)
    set_learning_rates(run)
    measures = Measures()
    passes = run.batches.batch(progress.step).split(stage.sequences_per_pass)
    for windows in passes:
        total, parts = run_pass(run, windows, mtp_weight)
        (total / len(passes)).backward()
        measures.add(parts)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.optimizer.clip_norm)
    for opt in run.optimizers:
        opt.step()
        opt.zero_grad()
    load = run.balancer.update(stage.bias_update_rate.at(progress.step, stage.steps))
    progress.step += 1
    progress.tokens += stage.sequences * stage.sequence_length
    return {**measures.means(), "gradient_norm": float(norm), "largest_load": load}


@torch.no_grad()
def held_out_measures(run: Run) -> dict[str, float]:
    """Return the losses on windows spread evenly over the held-out stream."""
    length, count = run.stage.sequence_length, run.recipe.held_out_sequences
    stride = (len(run.held_out_N) - length - 2) // count
    measures = Measures()
    for first in range(count):
        start = first * stride
        window = torch.from_numpy(run.held_out_N[start : start + length + 2].astype("int64"))
        _, parts = run_pass(run, window[None], mtp_weight=1.0)
        measures.add(parts)
    return {f"held_out_{name}": value for name, value in measures.means().items()}


def log(run: Run, measures: dict[str, Any]) -> None:
    """Append one line to log.jsonl and show it."""
    progress = run.progress
    entry = {"stage": run.stage.name, "step": progress.step, "tokens": progress.tokens}
    entry |= {"seconds": round(progress.seconds, 1)}
    entry |= {name: round(value, 5) for name, value in measures.items()}
    line = json.dumps(entry)
    with (run.directory / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    click.echo(line)


def save(run: Run) -> None:
    """Write the checkpoint from which the same command goes on."""
    checkpoints.save(run.directory / CHECKPOINT, run.model, run.optimizers, run.progress)


def prepare(recipe: Recipe, data: Path, directory: Path) -> Run | None:
    """Return the stage to run next, restored from the checkpoint if any; None: all are done."""
    file = directory / CHECKPOINT
    state = checkpoints.read(file) if file.exists() else None
    progress = Progress(**state["progress"]) if state else Progress()
    if progress.stage == len(recipe.stages):
        return None
    stage = recipe.stages[progress.stage]
    model = LanguageModel(
        recipe.model, has_indexer=stage.kind != "dense", compute_dtype=COMPUTE_DTYPE
    )
    initialise(model, recipe.seed, recipe.embedding_std, recipe.model["num_hidden_layers"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage.kind != "indexer" or ".indexer." in name)
    settings = recipe.optimizer
    optimizers = optimizer.build(
        model.named_parameters(),
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        epsilon=settings.epsilon,
    )
    if state:
        checkpoints.restore(state, model, optimizers)
    return Run(
        recipe=recipe,
        stage=stage,
        directory=directory,
        model=model,
        optimizers=optimizers,
        balancer=LoadBalancer(model.routers().values()),
        progress=progress,
        train_N=load_tokens(data / "train.bin"),
        held_out_N=load_tokens(data / "held_out.bin"),
    )


def run_stage(run: Run) -> None:
    """Train to the end of the stage; the last checkpoint begins the next one."""
    saved = time.monotonic()
    while run.progress.step < run.stage.steps:
        began = time.monotonic()
        measures = train_step(run)
        seconds = time.monotonic() - began
        run.progress.seconds += seconds
        if run.progress.step % LOG_EVERY == 0 or run.progress.step == 1:
            rate = run.stage.sequences * run.stage.sequence_length / seconds
            log(run, {**measures, "tokens_per_second": rate})
        if time.monotonic() - saved > run.recipe.checkpoint_seconds:
            save(run)
            log(run, held_out_measures(run))
            saved = time.monotonic()
    log(run, held_out_measures(run))
    number = run.progress.stage
    run.progress.stage, run.progress.step = number + 1, 0
    checkpoints.save(
        run.directory / f"after-stage-{number}.pt", run.model, run.optimizers, run.progress
    )
    save(run)


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=Path(__file__).with_name("recipe.toml"),
    help="Default: the recipe of the built-in model.",
)
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
def main(data: Path, output: Path, recipe_file: Path, threads: int) -> None:
    """Train on DATA/train.bin; OUTPUT gets checkpoints and log.jsonl and resumes a run."""
    torch.set_num_threads(threads)
    recipe = read_recipe(recipe_file)
    output.mkdir(parents=True, exist_ok=True)
    while (run := prepare(recipe, data, output)) is not None:
        run_stage(run)
    click.echo("every stage is done")


if __name__ == "__main__":
    main()
