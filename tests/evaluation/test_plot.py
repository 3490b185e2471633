"""The picture of a comparison says what was measured, in every colour of paper."""

from __future__ import annotations

import math
import sys
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mortise.errors import RequestError
from mortise.evaluation.estimate import Estimate
from mortise.evaluation.plot import PlottedModel, draw, figure_of, require_plot

if TYPE_CHECKING:
    from pathlib import Path

SVG = "{http://www.w3.org/2000/svg}"


def model(name: str, nats: float, divergence: float, error: float | None = 0.001) -> PlottedModel:
    return PlottedModel(
        name=name,
        bits_per_weight=8.25,
        perplexity=math.exp(nats),
        excess_nats=Estimate(nats - 2.2, error),
        divergence_nats=Estimate(divergence, error),
    )


MODELS = (model("exact", 2.2, 0.0), model("w8a8", 2.21, 0.004), model("w4a4", 2.4, 0.3))


def texts(path: Path) -> list[str]:
    return [text.text or "" for text in ET.parse(path).getroot().iter(f"{SVG}text")]


def test_a_drawing_holds_every_name_and_number_as_text(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    draw(MODELS, math.exp(2.2), path, "a & b")
    found = texts(path)
    for text in ("a & b", "exact", "w8a8", "w4a4", "8.2 bits/weight", "9.03", "9.12", "11.02"):
        assert text in found
    for text in ("0", "0.004", "0.3"):
        assert text in found


def test_a_drawing_is_described_in_words_and_follows_the_page(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    draw(MODELS, math.exp(2.2), path, "schemes")
    root = ET.parse(path).getroot()
    assert root.get("role") == "img"
    assert root.findtext(f"{SVG}title") == "schemes"
    description = root.findtext(f"{SVG}desc") or ""
    assert "w4a4, 8.2 bits/weight: perplexity 11.02, KL divergence 0.3 nats" in description
    assert "prefers-color-scheme: dark" in (root.findtext(f"{SVG}style") or "")


def test_the_same_numbers_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw(MODELS, 9.0, tmp_path / name, "schemes")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_an_image_has_a_transparent_background(tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = tmp_path / "a.png"
    draw(MODELS, 9.0, path, "schemes")
    pixels = imread(path)
    assert pixels[0, 0, 3] == 0
    assert pixels[..., 3].max() == 1


def test_points_and_bars_are_where_the_numbers_are() -> None:
    left, right = figure_of(MODELS, 9.0, "schemes").axes
    places = [tuple(bar.lines[0].get_xydata()[0]) for bar in left.containers]
    assert places == [(pytest.approx(one.perplexity), row) for row, one in enumerate(MODELS)]
    # What is exactly nothing has no place on a logarithmic axis: it is written, not drawn.
    places = [tuple(bar.lines[0].get_xydata()[0]) for bar in right.containers]
    assert places == [(0.004, 1), (0.3, 2)]
    (segment,) = right.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(segment[:, 0], [0.003, 0.005])
    (segment,) = left.containers[2].lines[2][0].get_segments()
    np.testing.assert_allclose(segment[:, 0], MODELS[2].perplexity * np.array([0.999, 1.001]))


def test_a_bar_longer_than_its_value_stays_on_the_axis() -> None:
    _, right = figure_of([model("wide", 2.2, 0.001, 0.01)], 9.0, "schemes").axes
    (segment,) = right.containers[0].lines[2][0].get_segments()
    assert segment[0, 0] > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_breaks_is_written_and_not_drawn(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.svg"
    broken = PlottedModel(
        name="broken",
        bits_per_weight=None,
        perplexity=value,
        excess_nats=Estimate(value, value),
        divergence_nats=Estimate(value, None),
    )
    draw([broken, MODELS[1]], 9.0, path, "schemes")
    assert texts(path).count(str(value)) == 2


def test_what_a_picture_needs_is_asked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_plot(tmp_path / "a.svg")
    with pytest.raises(RequestError, match=r"a\.pdf") as ending:
        require_plot(tmp_path / "a.pdf")
    assert ".svg or .png" in str(ending.value)
    with pytest.raises(RequestError, match="no directory"):
        require_plot(tmp_path / "absent" / "a.svg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RequestError, match="needs matplotlib") as missing:
        require_plot(tmp_path / "a.svg")
    assert missing.value.remedy == 'pip install "mortise-core[plot]"'


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.svg").mkdir()
    with pytest.raises(RequestError, match="cannot be written"):
        draw(MODELS, 9.0, tmp_path / "a.svg", "schemes")
