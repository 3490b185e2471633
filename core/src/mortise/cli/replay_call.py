"""One call of a recording, asked alone: what went in, what came out, and how far apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mortise.cli.output import document, print_json, results, table
from mortise.cli.replay_report import outcome_fields
from mortise.errors import RecordingError
from mortise.recording.outcome import Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mortise.recording.outcome import Outcome
    from mortise.recording.reader import Recording
    from mortise.recording.replayer import Replayer

COLUMNS = ("tensor", "dtype", "shape", "smallest", "largest", "mean", "norm", "not finite")


def show_call(
    recording: Recording,
    replayer: Replayer,
    number: int,
    save: Path | None,
    *,
    as_json: bool,
) -> int:
    """Replay a call and print it; the exit code is 1 if it diverges.

    Args:
        recording: where the call is.
        replayer: asks the backend.
        number: of the call.
        save: a file for its tensors, if they are wanted.
        as_json: print a document.

    Raises:
        RecordingError: there is no such call, or the file cannot be written.
    """
    call = recording.call(number)
    outcome = replayer.replay(call)
    tensors = _given(recording.arguments(call))
    for name, recorded, replayed in outcome.answers:
        tensors |= {f"{name}, recorded": recorded, f"{name}, replayed": replayed}
    if save is not None:
        _save(tensors, save)
    fields = outcome_fields(outcome)
    if as_json:
        rows = [{"tensor": name, **_statistics(tensor)} for name, tensor in tensors.items()]
        print_json(document(**fields, tensors=rows))
    else:
        _show(outcome, fields, tensors)
    return 1 if outcome.verdict is Verdict.DIVERGENT else 0


def _given(arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among a call's arguments, and in the weights among them."""
    found = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        for part in ("weight", "scale", "global_scale", "input_scale", "input_offset"):
            stored = getattr(value, "stored", value)
            if isinstance(tensor := getattr(stored, part, None), torch.Tensor):
                found[f"{name}.{part}"] = tensor
    return found


def _statistics(tensor: torch.Tensor) -> dict[str, Any]:
    values = tensor.double()
    finite = values[values.isfinite()]
    is_empty = not finite.numel()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "smallest": None if is_empty else float(finite.min()),
        "largest": None if is_empty else float(finite.max()),
        "mean": None if is_empty else float(finite.mean()),
        "norm": float(finite.norm()),
        "not_finite": values.numel() - finite.numel(),
    }


def _show(outcome: Outcome, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    console, call = results(), outcome.call
    made_in = f"pass {call.forward_pass}" if call.forward_pass else "loading"
    of_layer = f" of layer {call.layer}" if call.layer else ""
    mode = f" ({call.mode})" if call.mode else ""
    title = f"call {call.number}: {call.hook}{of_layer}, role {call.role}, {made_in}{mode}"
    console.print(title, markup=False)
    rows = [
        (name, *(_cell(value) for value in _statistics(tensor).values()))
        for name, tensor in tensors.items()
    ]
    if rows:
        console.print(table(COLUMNS, rows))
    note = f": {outcome.note}" if outcome.note else ""
    console.print(f"{outcome.verdict.value}{note}", markup=False, soft_wrap=True)
    if outcome.is_measured:
        for name in _MEASURES:
            console.print(f"  {name.replace('_', ' ')}: {_cell(fields[name])}", markup=False)


_MEASURES = (
    "error",
    "allowed",
    "row_error",
    "row_allowed",
    "worst_row",
    "gain",
    "max_abs",
    "worst_element",
    "recorded",
    "replayed",
    "ulps",
)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    if file.exists():
        raise RecordingError(
            f"{str(file)!r} is there already",
            expected="the name of a file that is not there yet",
            remedy="give another name, or remove it first",
        )
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    except (OSError, SafetensorError) as error:
        raise RecordingError(
            f"{str(file)!r} cannot be written: {error}",
            expected="a place where a file can be made",
            remedy="correct --save",
        ) from None
