"""The verbs ``record``, ``replay`` and ``diff``: where two backends part company."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mortise.cli.options import (
    configuration_options,
    configuration_options_but,
    json_option,
    resolve_options,
)
from mortise.cli.output import document, print_json, results

if TYPE_CHECKING:
    from collections.abc import Callable

    from mortise.config import ResolvedConfig
    from mortise.engine.llm import LLM
    from mortise.recording.documents import Header
    from mortise.recording.outcome import Report
    from mortise.recording.reader import Recording
    from mortise.recording.replayer import Replayer

DEFAULT_TOKENS = 8
DEFAULT_PROMPT = "def fibonacci(n):\n"
BACKEND_OPTIONS = ("backend", "device", "settings", "config_path")
"""Options of a configuration that a replay has a use for."""


def _prompt_options(command: Any) -> Any:
    """Add what a run is made with."""
    for add in reversed(
        [
            click.option(
                "--prompt", "prompts", multiple=True, metavar="TEXT", help="One more prompt."
            ),
            click.option(
                "--prompts-file",
                metavar="FILE",
                help='One prompt a line, as JSON: "text", {"prompt": "text"} or'
                ' {"token_ids": [1, 2]}.',
            ),
            click.option(
                "--max-tokens",
                type=int,
                default=DEFAULT_TOKENS,
                show_default=True,
                help="Tokens to generate.",
            ),
            click.option(
                "--sample",
                multiple=True,
                metavar="every:N|first:N|layers:PATTERN,...",
                help="Keep the calls of one pass in N, of the first N passes, of layers whose"
                " names match; may be given repeatedly.  [default: all]",
            ),
            click.option(
                "--max-bytes",
                metavar="SIZE",
                default="1GiB",
                show_default=True,
                help="Keep no more than this of tensors; what is left out is counted.",
            ),
        ]
    ):
        command = add(command)
    return command


@click.command(short_help="Keep every hook call of a run.")
@click.argument("output", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@_prompt_options
@configuration_options
@json_option
def record(output: Path, prompt: str | None, as_json: bool, **options: Any) -> None:
    """Continue PROMPT greedily and write every hook call on the way to the directory OUTPUT.

    Kept are what a hook was given, what it answered, and who asked: role, layer, forward pass.
    Weights are kept once a layer, as the checkpoint stores them. `mortise replay` asks another
    backend the same. OUTPUT must not be there yet, and appears whole or not at all. Without PROMPT
    a few words of Python are continued.
    """
    resolved = resolve_options(options)
    header = _recorded(resolved, output, _run(prompt, options), options)
    if as_json:
        print_json(document(recording=str(output), **header_fields(header)))
        return
    console = results()
    for line in header_lines(output, header):
        console.print(line, markup=False)


@click.command(short_help="Ask another backend what a run asked of its own.")
@click.argument("recording", type=click.Path(path_type=Path))
@click.option("--call", "number", type=int, metavar="N", help="Ask this call alone, and show it.")
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --call: write its tensors to this safetensors file.",
)
@configuration_options_but(
    "model",
    "dtype",
    "dispatch_dtype",
    "draft",
    "draft_model",
    "draft_quantization",
    "draft_dispatch_dtype",
    "threads",
    "strict",
)
@json_option
def replay(
    recording: Path, number: int | None, save: Path | None, as_json: bool, **options: Any
) -> int:
    """Ask a backend every call of RECORDING, and compare its answers with the recorded ones.

    Shown is for each hook and layer the largest error, relative to the norm of the answer, beside
    what roundings explain; and the first call that is further off. Exit code 1 says that one is,
    or that nothing could be compared.
    """
    from mortise.recording.reader import Recording

    if save is not None and number is None:
        raise click.UsageError("--save writes nothing without --call")
    resolved = resolve_options(_whole(options))
    found = Recording.open(recording)
    replayer = _replayer(found, resolved)
    if number is not None:
        from mortise.cli.replay_call import show_call

        return show_call(found, replayer, number, save, as_json=as_json)
    return _shown(found, _replayed(replayer), as_json)


@click.command("diff", short_help="Find the first hook call in which two backends differ.")
@click.argument("prompt", required=False)
@click.option(
    "--backend",
    "backends",
    metavar="NAME",
    multiple=True,
    help="Given twice: the backend that runs, and the one that is asked the same.",
)
@click.option(
    "--device",
    "devices",
    metavar="TEXT",
    multiple=True,
    help="Device of the second backend; given twice, of the first and of the second.",
)
@_prompt_options
@configuration_options_but("backend", "device")
@json_option
def diff(
    prompt: str | None,
    backends: tuple[str, ...],
    devices: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> int:
    """Record a run on one backend, and replay it on another: `record` and `replay` in one go.

    Every call is asked with the inputs that the first backend had, so that an error is shown where
    it is made and not where it arrives. Exit code 1 says that a call diverges, or that nothing
    could be compared.
    """
    if len(backends) != 2:
        raise click.UsageError(f"--backend is given {len(backends)} times, not twice")
    if len(devices) > 2:
        raise click.UsageError(f"--device is given {len(devices)} times, not at most twice")
    from mortise.recording.reader import Recording

    first, second = ((None, *devices) if len(devices) == 1 else (*devices, None, None))[:2]
    run = _run(prompt, options)
    running = resolve_options(options | {"backend": backends[0], "device": first})
    asked = resolve_options(options | {"backend": backends[1], "device": second})
    with tempfile.TemporaryDirectory(prefix="mortise-diff-") as folder:
        path = Path(folder) / "recording"
        _recorded(running, path, run, options)
        found = Recording.open(path)
        return _shown(found, _replayed(_replayer(found, asked)), as_json)


def _whole(options: dict[str, Any]) -> dict[str, Any]:
    """With everything that a replay has no option for unset."""
    from mortise.cli.options import CONFIGURATION_OPTIONS

    return dict.fromkeys(name for _, name, _ in CONFIGURATION_OPTIONS) | options


def _run(prompt: str | None, options: dict[str, Any]) -> Callable[[LLM], None]:
    """What is done with a model, checked before one is loaded."""
    from mortise.cli.prompts import read_prompts
    from mortise.engine.sampling_params import SamplingParams

    sampling = SamplingParams(max_tokens=options["max_tokens"], token_healing=False)
    is_given = prompt is not None or options["prompts"] or options["prompts_file"]
    prompts = (
        read_prompts(prompt, options["prompts"], options["prompts_file"])
        if is_given
        else [DEFAULT_PROMPT]
    )

    def run(llm: LLM) -> None:
        from mortise.cli.failure import show_warning
        from mortise.cli.news import news_of

        for text in news_of(llm):
            show_warning(text)
        llm.generate(prompts, sampling)

    return run


def _recorded(
    resolved: ResolvedConfig, output: Path, run: Callable[[LLM], None], options: dict[str, Any]
) -> Header:
    from mortise.cli.session import progress_bar
    from mortise.cli.speaker import own_launch
    from mortise.errors import RecordingError
    from mortise.recording.sampling import Sampling, bytes_of
    from mortise.recording.session import record as record_run

    if own_launch() is not None:
        raise RecordingError(
            "several processes are started, and a recording is of one",
            expected="a single process",
            remedy="start it without a launcher such as torchrun",
        )
    sampling, max_bytes = Sampling.parse(options["sample"]), bytes_of(options["max_bytes"])
    with progress_bar("loading", is_bytes=True) as advance:
        return record_run(
            resolved, output, run, sampling=sampling, max_bytes=max_bytes, progress=advance
        )


def _replayer(recording: Recording, resolved: ResolvedConfig) -> Replayer:
    from mortise.engine.binding import bind_backend
    from mortise.recording.replayer import Replayer

    bind = partial(bind_backend, resolved, None)
    return Replayer(recording, lambda role: bind(role).ops)


def _replayed(replayer: Replayer) -> Report:
    from mortise.cli.session import progress_bar

    with progress_bar("replaying") as advance:
        return replayer.report(advance)


def _shown(recording: Recording, report: Report, as_json: bool) -> int:
    from mortise.cli.replay_report import report_fields, show_report

    if as_json:
        print_json(document(**report_fields(recording, report)))
    else:
        show_report(recording, report)
    return 0 if report.is_clean else 1


def header_fields(header: Header) -> dict[str, Any]:
    """What a recording says of itself, for a document."""
    fields = header.model_dump(by_alias=True)
    return {name: fields[name] for name in fields if name not in {"schema", "format", "files"}}


def header_lines(output: Path, header: Header) -> list[str]:
    """The same, for people."""
    left_out = sum(one.calls for one in header.left_out)
    kept = f"{header.num_calls - left_out} of {header.num_calls} hook calls"
    lines = [f"{output}: {kept}, {header.tensor_bytes / 1e6:.1f} MB of tensors"]
    for reason in sorted({one.reason for one in header.left_out}):
        calls = sum(one.calls for one in header.left_out if one.reason == reason)
        lines.append(f"left out by --{reason.replace('_', '-')}: {calls} calls")
    return lines
