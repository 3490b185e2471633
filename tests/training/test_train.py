import json
from pathlib import Path

import pytest
import torch
from tests.training import tiny
from training import checkpoints
from training.train import (
    CHECKPOINT,
    Run,
    held_out_measures,
    log,
    prepare,
    run_stage,
    save,
    train_step,
)


def must_prepare(data: Path, output: Path) -> Run:
    output.mkdir(exist_ok=True)
    run = prepare(tiny.recipe(), data, output)
    assert run is not None
    return run


def state_of(output: Path) -> dict[str, torch.Tensor]:
    state = checkpoints.read(output / CHECKPOINT)
    flat = dict(state["model"])
    for name, values in state["optimizer"].items():
        flat |= {f"{name}/{key}": value for key, value in values.items()}
    return flat


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    data = tiny.write_data(tmp_path_factory.mktemp("data"))
    output = tmp_path_factory.mktemp("run")
    for _ in tiny.recipe().stages:
        run_stage(must_prepare(data, output))
    return data, output


def test_all_stages_run_one_after_the_other(trained: tuple[Path, Path]) -> None:
    data, output = trained
    assert prepare(tiny.recipe(), data, output) is None
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(entry["stage"] for entry in entries)) == [
        "pretrain",
        "indexer warm-up",
        "sparse",
    ]
    last = entries[-1]
    assert last["tokens"] == 4 * 4 * (16 + 24 + 24)
    assert {"held_out_loss", "held_out_mtp_loss", "held_out_index_loss"} <= last.keys()


def test_only_the_indexers_learn_while_they_warm_up(trained: tuple[Path, Path]) -> None:
    _, output = trained
    before, after = (
        checkpoints.read(output / f"after-stage-{number}.pt")["model"] for number in (0, 1)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name for name in after if name not in before} == {
        name for name in after if ".indexer." in name
    }


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_resumed_run_equals_an_unbroken_one(
    trained: tuple[Path, Path], tmp_path: Path, stage: int
) -> None:
    data, output = trained
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        if stage:
            state = (output / f"after-stage-{stage - 1}.pt").read_bytes()
            (tmp_path / name / CHECKPOINT).write_bytes(state)
    whole = must_prepare(data, tmp_path / "whole")
    for _ in range(4):
        train_step(whole)
    save(whole)
    for _ in range(2):
        broken = must_prepare(data, tmp_path / "broken")
        train_step(broken)
        train_step(broken)
        save(broken)
    expected, got = state_of(tmp_path / "whole"), state_of(tmp_path / "broken")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_the_loss_falls(tmp_path: Path) -> None:
    run = must_prepare(tiny.write_data(tmp_path), tmp_path / "run")
    before = held_out_measures(run)["held_out_loss"]
    for _ in range(4):
        train_step(run)
    run.progress.step = 1  # the rate of the second step, not that of the end
    for _ in range(12):
        train_step(run)
        run.progress.step = 1
    assert held_out_measures(run)["held_out_loss"] < before - 0.15


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    run = must_prepare(tiny.write_data(tmp_path), tmp_path / "run")
    save(run)
    expected = state_of(run.directory)
    assert held_out_measures(run) == held_out_measures(run)
    assert run.balancer.update(0.5) == 0.0
    save(run)
    got = state_of(run.directory)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_log_line_says_where_the_run_is(tmp_path: Path) -> None:
    run = must_prepare(tiny.write_data(tmp_path), tmp_path / "run")
    log(run, train_step(run))
    entry = json.loads((run.directory / "log.jsonl").read_text())
    assert (entry["stage"], entry["step"], entry["tokens"]) == ("pretrain", 1, 64)
