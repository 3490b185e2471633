"""The verb ``quantize``: a model directory again, its weights in a published quantised layout."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mortise.cli.options import json_option
from mortise.cli.output import document, print_json, results, table
from mortise.errors import QuantizationConfigError

if TYPE_CHECKING:
    from mortise.checkpoint.quantization.write.recipe import Recipe, Rule
    from mortise.checkpoint.quantization.write.report import KindReport, QuantisationReport
    from mortise.engine.calibration import Calibration

SCHEMES = ("fp8-block", "w8a8", "w8a8-static", "w4a8", "w4a16", "w4a4", "nvfp4")
DIALECTS = ("fp8", "compressed-tensors", "modelopt", "modelslim")


@click.command("quantize", short_help="Write a quantised copy of a model.")
@click.argument("output")
@click.option(
    "--scheme",
    required=True,
    type=click.Choice(SCHEMES),
    help="Number format of weights and inputs.",
)
@click.option(
    "--draft-scheme",
    type=click.Choice((*SCHEMES, "none")),
    default="none",
    show_default=True,
    help="Number format of the multi-token prediction layers; none leaves them as they are.",
)
@click.option(
    "--dialect",
    type=click.Choice(DIALECTS),
    help="Whose layout is written.  [default: the first here that stores the scheme]",
)
@click.option(
    "--group-size",
    type=int,
    metavar="COLUMNS",
    help="Columns that share a scale of int4.  [default: 128, in modelslim all]",
)
@click.option(
    "--ignore",
    multiple=True,
    metavar="PATTERN",
    help="Leave the projections that match unquantised; * is any part of a name. Repeatable.",
)
@click.option(
    "--scheme-for",
    multiple=True,
    metavar="PATTERN=SCHEME",
    help="Another scheme (or float) for the projections that match; the first counts. Repeatable.",
)
@click.option("--ue8m0", is_flag=True, help="fp8-block: round scales up to powers of two.")
@click.option(
    "--model",
    default="builtin",
    metavar="PATH",
    help="Unquantised model directory in the Hugging Face layout.  [default: builtin]",
)
@click.option(
    "--calibration",
    metavar="FILE",
    help="Text, as `mortise eval` reads it, whose first 2048 tokens show what the inputs of"
    " nvfp4 and w8a8-static are.  [default: text that the model writes]",
)
@json_option
def quantize(
    output: str, model: str, calibration: str | None, as_json: bool, **options: Any
) -> None:
    """Write a copy of a model to the directory OUTPUT, quantised.

    Quantised are the projections of attention, dense blocks and experts in the decoder layers.
    Embeddings, head, norms and routers stay as they are. So do multi-token prediction layers,
    unless --draft-scheme quantises their block too. fp8 stores fp8-block; compressed-tensors stores
    w8a8, w4a8, w4a16 and nvfp4; modelopt stores nvfp4; modelslim stores w8a8, w8a8-static, w4a8 and
    w4a4.

    OUTPUT appears when everything is written. The table says what was lost: the root mean square
    of the differences between the weights, relative to that of the weights.
    """
    from mortise.cli.quantised_copy import write_copy

    started = time.perf_counter()
    recipe = _recipe(**options)
    destination = Path(output).absolute()
    copy = write_copy(model, destination, recipe, calibration)
    report, seen = copy.report, copy.calibration
    facts = {
        "model": str(copy.source.path),
        "output": str(destination),
        "dialect": recipe.dialect,
        "seconds": time.perf_counter() - started,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "calibration": None if seen is None else _calibration_fields(seen, calibration),
    }
    if as_json:
        print_json(document(**facts, **_report_fields(report)))
        return
    _show(facts, report)


def _recipe(
    *,
    scheme: str,
    draft_scheme: str,
    dialect: str | None,
    group_size: int | None,
    ignore: tuple[str, ...],
    scheme_for: tuple[str, ...],
    ue8m0: bool,
) -> Recipe:
    from mortise.checkpoint.quantization.write.recipe import Recipe

    return Recipe.of(
        scheme,
        dialect,
        draft_scheme=draft_scheme,
        group_size=group_size,
        ignore=ignore,
        rules=[_rule(text) for text in scheme_for],
        powers_of_two=ue8m0,
    )


def _rule(text: str) -> Rule:
    from mortise.checkpoint.quantization.write.recipe import Rule

    pattern, equals, scheme = text.rpartition("=")
    if not equals or not pattern:
        raise QuantizationConfigError(
            f"--scheme-for is {text!r}",
            expected="PATTERN=SCHEME, such as '*.experts.*.down_proj=w8a8'",
            remedy="correct --scheme-for",
        )
    return Rule(pattern, scheme)


def _calibration_fields(seen: Calibration, file: str | None) -> dict[str, Any]:
    return {"text": file, "sequences": seen.sequences, "tokens": seen.tokens}


def _report_fields(report: QuantisationReport) -> dict[str, Any]:
    return {
        "quantised": [
            {
                "kind": kind.kind,
                "scheme": kind.scheme,
                "group_size": kind.group_size,
                "projections": kind.projections,
                "bytes_before": kind.bytes_before,
                "bytes_after": kind.bytes_after,
                "relative_error": kind.relative_error,
            }
            for kind in report.kinds
        ],
        "unquantised": [
            {"kind": left.kind, "projections": left.projections, "reason": left.reason}
            for left in report.left
        ],
    }


def _show(facts: dict[str, Any], report: QuantisationReport) -> None:
    console = results()
    console.print(
        f"{facts['output']}: {facts['dialect']}, {facts['bytes_after']} bytes instead of"
        f" {facts['bytes_before']}; {facts['seconds']:.1f} s",
        markup=False,
        soft_wrap=True,
    )
    if facts["calibration"] is not None:
        text = facts["calibration"]["text"] or "text that the model wrote"
        console.print(
            f"calibrated with {facts['calibration']['tokens']} tokens of {text}",
            markup=False,
            soft_wrap=True,
        )
    console.print()
    console.print(
        table(
            ("quantised", "scheme", "projections", "bytes before", "bytes after", "error"),
            map(_row, report.kinds),
        )
    )
    if report.left:
        console.print()
        console.print(
            table(
                ("unquantised", "projections", "reason"),
                [(left.kind, str(left.projections), left.reason) for left in report.left],
            )
        )


def _row(kind: KindReport) -> tuple[str, ...]:
    groups = "" if kind.group_size is None else f" in groups of {kind.group_size}"
    return (
        kind.kind,
        f"{kind.scheme}{groups}",
        str(kind.projections),
        str(kind.bytes_before),
        str(kind.bytes_after),
        f"{kind.relative_error:.4f}",
    )
