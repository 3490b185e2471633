"""A picture of what schemes cost: perplexity and divergence, with their standard errors."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from mortise.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mortise.evaluation.estimate import Estimate

ENDINGS: Final = (".svg", ".png")

# Greys and a teal that stand out from white and from black paper alike.
INK: Final = "#767676"
POINT: Final = "#2f8c9d"

SETTINGS: Final[Mapping[Any, Any]] = MappingProxyType(
    {
        "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and restyled
        "svg.hashsalt": "mortise",  # the same numbers give the same file
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "grid.color": INK,
        "grid.alpha": 0.25,
        "xtick.color": INK,
        "ytick.color": INK,
        "ytick.left": False,
    }
)

# matplotlib writes colours into each element, which only !important outranks.
STYLE: Final = """
:root { color-scheme: light dark; }
text { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif !important;
       fill: #4a4a4a !important; }
@media (prefers-color-scheme: dark) { text { fill: #d0d0d0 !important; } }
"""
SVG: Final = "http://www.w3.org/2000/svg"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlottedModel:
    """One row of the picture.

    Args:
        name: of the scheme or the model.
        bits_per_weight: shown below the name; None is not shown.
        perplexity: per token.
        excess_nats: beyond the unquantised model's, per token.
        divergence_nats: KL(unquantised || model), per token.
    """

    name: str
    bits_per_weight: float | None
    perplexity: float
    excess_nats: Estimate
    divergence_nats: Estimate


def require_plot(path: Path) -> None:
    """Require what a picture needs, before anything is measured for it.

    Raises:
        RequestError: the ending is unknown, there is no such directory, or matplotlib is missing.
    """
    if path.suffix not in ENDINGS:
        raise RequestError(
            f"--plot is {str(path)!r}",
            expected=f"a file name that ends in {' or '.join(ENDINGS)}",
            remedy="correct the ending",
        )
    if not path.absolute().parent.is_dir():
        raise RequestError(
            f"--plot is {str(path)!r}, and there is no directory {str(path.absolute().parent)!r}",
            expected="a file name in a directory that exists",
            remedy="make the directory first",
        )
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f"--plot needs matplotlib, which cannot be imported: {error}",
            expected="matplotlib, an optional part of the installation",
            remedy='pip install "mortise-core[plot]"',
        ) from None


def draw(
    models: Sequence[PlottedModel], reference_perplexity: float, path: Path, title: str
) -> None:
    """Write the picture: a row a model, perplexity on the left and divergence on the right.

    Bars are one standard error. That of a perplexity is the error of its difference from the
    unquantised model's, so that a bar which reaches the dashed line means no difference.

    Args:
        models: from top to bottom, at least one.
        reference_perplexity: of the unquantised model, drawn as a line.
        path: ``.svg`` or ``.png``; its background is transparent.
        title: what was measured on which text.

    Raises:
        RequestError: the file cannot be written.
    """
    import matplotlib as mpl

    with mpl.rc_context(dict(SETTINGS)):
        figure = figure_of(models, reference_perplexity, title)
        # A date would make every file another one.
        metadata = {"Date": None, "Title": title} if path.suffix == ".svg" else {"Title": title}
        try:
            figure.savefig(path, transparent=True, dpi=200, metadata=metadata)
            if path.suffix == ".svg":
                _describe(path, _words(models, reference_perplexity))
        except OSError as error:
            raise RequestError(
                f"the plot {str(path)!r} cannot be written: {error}",
                expected="a file name in a directory that can be written to",
                remedy="correct --plot or the permissions",
            ) from None


def figure_of(models: Sequence[PlottedModel], reference_perplexity: float, title: str) -> Figure:
    """The picture before it is written; the arguments are those of :func:`draw`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.9 + 0.48 * len(models)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2, sharey=True)
    left.set_yticks(range(len(models)), [_label(one) for one in models])
    left.set_ylim(len(models) - 0.5, -0.5)
    _prepare_axes(left, right, reference_perplexity)
    for row, one in enumerate(models):
        # The slope of exp(nats) is the perplexity itself.
        error = one.perplexity * (one.excess_nats.standard_error or 0.0)
        _point(left, row, one.perplexity, error, f"{one.perplexity:.2f}")
        found = one.divergence_nats
        _point(right, row, found.mean, found.standard_error or 0.0, f"{found.mean:.2g}")
    return figure


def _label(model: PlottedModel) -> str:
    bits = model.bits_per_weight
    return model.name if bits is None else f"{model.name}\n{bits:.1f} bits/weight"


def _prepare_axes(left: Axes, right: Axes, reference_perplexity: float) -> None:
    from matplotlib.ticker import NullFormatter

    left.set_xlabel("perplexity per token (dashed: unquantised)")
    left.axvline(reference_perplexity, color=INK, linestyle="--", linewidth=1)
    left.margins(x=0.2)
    right.set_xlabel("KL divergence, nats per token")
    right.set_xscale("log")
    right.margins(x=0.25)
    # Powers of ten as formulas would be drawn apart from the text, and keep their colour.
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.xaxis.set_minor_formatter(NullFormatter())
    for axes in (left, right):
        axes.grid(axis="x")
        axes.set_axisbelow(True)


def _point(axes: Axes, row: int, value: float, error: float, label: str) -> None:
    """A value with its bar; one that has no place on the axis is only written, at its left end."""
    logarithmic = axes.get_xscale() == "log"
    if not math.isfinite(value) or (logarithmic and value <= 0):
        axes.text(0.02, row, label, va="center", transform=axes.get_yaxis_transform())
        return
    below = min(error, value * 0.9) if logarithmic else error
    axes.errorbar(
        value, row, xerr=[[below], [error]], fmt="o", color=POINT, markersize=5, capsize=3
    )
    axes.annotate(
        label, (value + error, row), (7, 0), textcoords="offset points", va="center_baseline"
    )


def _words(models: Sequence[PlottedModel], reference_perplexity: float) -> str:
    """The picture for those who do not see it."""
    told = [
        f"{', '.join(_label(one).splitlines())}: perplexity {one.perplexity:.2f},"
        f" KL divergence {one.divergence_nats.mean:.2g} nats"
        for one in models
    ]
    return f"Unquantised: perplexity {reference_perplexity:.2f}. {'; '.join(told)}."


def _describe(path: Path, words: str) -> None:
    """Give a drawing words, and colours that follow those of the page."""
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    tree = ET.parse(path)
    root = tree.getroot()
    root.set("role", "img")
    style, description = ET.Element(f"{{{SVG}}}style"), ET.Element(f"{{{SVG}}}desc")
    style.text, description.text = STYLE, words
    # Behind the title, which has to be the first.
    root.insert(1, description)
    root.insert(2, style)
    tree.write(path, encoding="unicode", xml_declaration=False)
