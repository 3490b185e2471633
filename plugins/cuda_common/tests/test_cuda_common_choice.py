"""The figures that choose between DeepGEMM and Triton, and what is said of the choice."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from plugins.cuda_common.tests.test_cuda_common_limits import experts_of

from mortise.backends import load_backend
from mortise.errors import ConfigError
from mortise.plugin import ModelRole, WeightScheme
from mortise_cuda_common.choice import (
    Choice,
    Figure,
    Measurement,
    Runner,
    choice,
    read_measurements,
    rows_per_expert,
)
from mortise_cuda_common.groups import Groups

if TYPE_CHECKING:
    from pathlib import Path

H100 = "NVIDIA H100 80GB HBM3"


def published(intermediate_size: int) -> Choice:
    return choice(read_measurements(), H100, intermediate_size)


def measured(chip: str, *figures: tuple[int, float, float, float]) -> Measurement:
    names = ("intermediate_size", "rows_per_expert", "deep_gemm_us", "triton_us")
    return Measurement(
        source="a benchmark",
        date=dt.date(2026, 1, 2),
        chip=chip,
        hidden_size=64,
        figures=tuple(
            Figure.model_validate(dict(zip(names, figure, strict=True))) for figure in figures
        ),
    )


@pytest.mark.parametrize(
    ("intermediate_size", "rows", "wanted"),
    [
        # 256 experts of DeepSeek-V3 on one rank: 2 x 2048 rows of w13, at every published batch.
        (2048, 4, Runner.DEEP_GEMM),
        (2048, 64, Runner.DEEP_GEMM),
        (2048, 96, Runner.DEEP_GEMM),
        # Cut among eight ranks: 2 x 256, from 128 tokens on.
        (256, 4, Runner.TRITON),
        (256, 64, Runner.TRITON),
        # Cut among four, they change places twice.
        (512, 16, Runner.DEEP_GEMM),
        (512, 40, Runner.TRITON),
        (512, 64, Runner.DEEP_GEMM),
        # Shapes and numbers of rows that nobody published go with the nearest.
        (1536, 100_000, Runner.DEEP_GEMM),
        (128, 0, Runner.TRITON),
    ],
)
def test_the_published_figures(intermediate_size: int, rows: float, wanted: Runner) -> None:
    assert published(intermediate_size).runner(rows) is wanted


def test_every_published_figure_has_its_source() -> None:
    for measurement in read_measurements():
        assert "#" in measurement.source
        assert measurement.date < dt.date(2026, 12, 31)
        keys = [(one.intermediate_size, one.rows_per_expert) for one in measurement.figures]
        assert len(keys) == len(set(keys))


def test_the_choice_is_said_in_words() -> None:
    wide = published(2048).describe()
    assert wide == (
        "deep_gemm (figures of H100, experts of 2048: vllm-project/vllm#13932, 2025-02-26)"
    )
    assert (
        published(512)
        .describe()
        .startswith(
            "deep_gemm near 4 to 16 rows an expert or triton near 32 to 48 rows an expert or"
            " deep_gemm near 64 rows an expert (figures of H100"
        )
    )


def test_figures_of_the_same_chip_go_before_nearer_ones_of_another() -> None:
    both = (measured("H100", (256, 8, 2, 1)), measured("H200", (2048, 8, 1, 2)))
    assert choice(both, "NVIDIA H200", 256).runner(8) is Runner.DEEP_GEMM
    assert choice(both, H100, 256).runner(8) is Runner.TRITON
    assert choice(both, "NVIDIA B200", 300).runner(8) is Runner.TRITON


def test_a_table_that_a_benchmark_wrote_is_read(tmp_path: Path) -> None:
    path = tmp_path / "measured.toml"
    path.write_text(
        '[[measurements]]\nsource = "ours"\ndate = 2026-01-02\nchip = "H200"\nhidden_size = 64\n'
        "figures = [{ intermediate_size = 64, rows_per_expert = 2.5, deep_gemm_us = 3,"
        " triton_us = 2 }]\n"
    )
    (measurement,) = read_measurements(path)
    assert (measurement.chip, measurement.figures[0].faster) == ("H200", Runner.TRITON)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("measurements = [", "measured.toml"),
        ("measurements = []", "measurements"),
        ('[[measurements]]\nsource = "ours"\n', r"measurements\.0\.date: Field required; meas"),
        ("\x00", "measured.toml"),
    ],
)
def test_a_table_that_is_none_is_an_error(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "measured.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=what) as caught:
        read_measurements(path)
    assert "\n" not in caught.value.what
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        read_measurements(tmp_path / "missing.toml")


def test_rows_of_an_expert_are_counted_where_the_host_knows_them() -> None:
    groups = Groups(
        first_rows=torch.tensor([0, 128]),
        counts=torch.tensor([3, 5], dtype=torch.int32),
        num_rows=256,
        alignment=128,
    )
    assert rows_per_expert(replace(groups, host_counts=(3, 5))) == 4
    # Of 256 rows 254 may be padding.
    assert rows_per_expert(groups) == 1
    assert rows_per_expert(replace(groups, num_rows=2 * 1127)) == 1000
    assert rows_per_expert(replace(groups, capacity=8, num_rows=16)) == 8


def test_a_backend_goes_by_the_figures_that_its_options_name(tmp_path: Path) -> None:
    path = tmp_path / "measured.toml"
    path.write_text(
        '[[measurements]]\nsource = "ours"\ndate = 2026-01-02\nchip = "H100"\nhidden_size = 64\n'
        "figures = [{ intermediate_size = 2048, rows_per_expert = 2, deep_gemm_us = 3,"
        " triton_us = 2 }]\n"
    )
    table = {"runner_figures": str(path)}
    bound = load_backend("cuda_hopper", role=ModelRole.MAIN, device="emulated", options=table)
    method = bound.ops.supports(experts_of(WeightScheme.FP8_BLOCK)).method
    assert method is not None
    assert method.runner == "triton (figures of H100, experts of 2048: ours, 2026-01-02)"
    table = {"runner_figures": str(tmp_path / "missing.toml")}
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        load_backend("cuda_hopper", role=ModelRole.MAIN, device="emulated", options=table)
