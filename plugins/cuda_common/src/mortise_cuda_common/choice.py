"""Whether DeepGEMM or Triton multiplies a layer's float8 experts, by figures of both."""

# Each figure has its source. Those of the experts that are nearest to the layer's decide, of the
# number of rows that is nearest to the call's.

from __future__ import annotations

import datetime as dt
import math
import tomllib
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mortise.plugin import ConfigError
from mortise_cuda_common.kernels.tilings import rows_of_a_group

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise_cuda_common.groups import Groups

PUBLISHED = Path(__file__).with_name("runner_figures.toml")
"""What others measured; nothing in it was measured with the programs of this package."""


class Runner(StrEnum):
    """What the configuration asks for; the values are those of its key ``runner``."""

    AUTO = "auto"
    DEEP_GEMM = "deep_gemm"
    TRITON = "triton"


_Positive = Annotated[float, Field(gt=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(_Record):
    """Microseconds of one call of a layer's experts.

    Args:
        intermediate_size: I of each expert.
        rows_per_expert: the average.
        deep_gemm_us, triton_us: microseconds, of both projections and all between.
    """

    intermediate_size: int = Field(gt=0)
    rows_per_expert: _Positive
    deep_gemm_us: _Positive
    triton_us: _Positive

    @property
    def faster(self) -> Runner:
        """Which took less time."""
        return Runner.DEEP_GEMM if self.deep_gemm_us < self.triton_us else Runner.TRITON


class Measurement(_Record):
    """Figures of one chip from one source.

    Args:
        source: where they can be read.
        date: of the source.
        chip: a part of its name as the driver gives it.
        hidden_size: H.
        figures: the figures.
    """

    source: str
    date: dt.date
    chip: str
    hidden_size: int = Field(gt=0)
    figures: tuple[Figure, ...] = Field(min_length=1)


class _Table(_Record):
    measurements: tuple[Measurement, ...] = Field(min_length=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The figures that decide for one layer.

    Args:
        measurement: where they are from.
        figures: those of the intermediate size that is nearest to the layer's, by rows.
    """

    measurement: Measurement
    figures: tuple[Figure, ...]

    def runner(self, rows_per_expert: float) -> Runner:
        """The faster way for so many rows of each expert, on average."""
        rows = max(rows_per_expert, 1.0)
        nearest = min(self.figures, key=lambda figure: _apart(figure.rows_per_expert, rows))
        return nearest.faster

    def describe(self) -> str:
        """What is chosen when, and by whose figures."""
        runs = [(runner, tuple(run)) for runner, run in groupby(self.figures, lambda f: f.faster)]
        ways = " or ".join(
            runner if len(runs) == 1 else f"{runner} near {_rows(run)} rows an expert"
            for runner, run in runs
        )
        source, chip = self.measurement.source, self.measurement.chip
        size = self.figures[0].intermediate_size
        return f"{ways} (figures of {chip}, experts of {size}: {source}, {self.measurement.date})"


def rows_per_expert(groups: Groups) -> float:
    """The average, or what the host takes for it where it does not know the counts."""
    if groups.host_counts is None:
        return rows_of_a_group(groups)
    return sum(groups.host_counts) / groups.num_groups


def choice(measurements: tuple[Measurement, ...], chip: str, intermediate_size: int) -> Choice:
    """Take the figures of the same chip where there are any, and of the nearest experts.

    Args:
        measurements: those that may decide.
        chip: its name, as the driver gives it.
        intermediate_size: I of the layer's experts.
    """
    own = tuple(one for one in measurements if one.chip in chip) or measurements
    measurement, nearest = min(
        ((one, figure) for one in own for figure in one.figures),
        key=lambda pair: _apart(pair[1].intermediate_size, intermediate_size),
    )
    figures = _of_size(measurement, nearest.intermediate_size)
    return Choice(
        measurement=measurement,
        figures=tuple(sorted(figures, key=lambda figure: figure.rows_per_expert)),
    )


def read_measurements(path: str | Path | None = None) -> tuple[Measurement, ...]:
    """Read a table of figures.

    Args:
        path: what a benchmark wrote; None is what was published.

    Raises:
        ConfigError: the file cannot be read, or is no such table.
    """
    path = PUBLISHED if path is None else Path(path)
    try:
        return _Table.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).measurements
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise ConfigError(
            f"figures of runners cannot be read from {path}: {_in_words(error)}",
            expected="a TOML table of measurements like mortise_cuda_common/runner_figures.toml",
            remedy="correct the file, or remove runner_figures and go by published figures",
        ) from error


def _in_words(error: Exception) -> str:
    """One line, every complaint with its place in the table."""
    if not isinstance(error, ValidationError):
        return str(error)
    complaints = error.errors(include_url=False)
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in complaints)


def _of_size(measurement: Measurement, size: int) -> Iterator[Figure]:
    return (figure for figure in measurement.figures if figure.intermediate_size == size)


def _apart(one: float, other: float) -> float:
    return abs(math.log2(one / other))


def _rows(run: tuple[Figure, ...]) -> str:
    least, most = run[0].rows_per_expert, run[-1].rows_per_expert
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"
