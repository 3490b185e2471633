"""The measurements for a GPU run on the emulated one, and make a table that backends choose by."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from benchmarks.cuda.__main__ import BENCHMARKS, main
from click.testing import CliRunner

from mortise_cuda_common.choice import read_measurements

if TYPE_CHECKING:
    from pathlib import Path

TINY = ["--device", "emulated", "--tiny", "--rounds", "1"]


def test_every_benchmark_runs_and_says_what_it_could_not_measure(tmp_path: Path) -> None:
    table = tmp_path / "figures.toml"
    outcome = CliRunner().invoke(main, [*TINY, "--json", "--figures", str(table)])
    assert outcome.exit_code == 0, outcome.output
    document = json.loads(outcome.stdout)
    assert (document["device"], document["emulated"]) == ("no GPU", True)
    assert {row["benchmark"] for row in document["rows"]} == set(BENCHMARKS)
    for row in document["rows"]:
        assert all(taken > 0 for taken in row["microseconds"].values())
    experts = [row for row in document["rows"] if row["benchmark"] == "experts"]
    assert all({"auto", "deep_gemm", "triton"} <= row["microseconds"].keys() for row in experts)
    (measured,) = read_measurements(table)
    assert (measured.chip, measured.hidden_size) == ("no GPU", 256)
    assert len(measured.figures) == len(experts)


def test_times_of_an_emulation_are_not_kept() -> None:
    outcome = CliRunner().invoke(main, [*TINY, "--save"])
    assert outcome.exit_code == 2
    assert "--save keeps times of a GPU alone" in outcome.output


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_a_machine_without_a_gpu_says_what_is_missing() -> None:
    outcome = CliRunner().invoke(main, ["--rounds", "1"])
    assert outcome.exit_code == 1
    assert "is built without CUDA" in outcome.output
    assert "remedy: install a torch that is built for CUDA" in outcome.output
