"""The verb ``generate``: continue prompts, showing the text while it comes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import click

from mortise.cli.options import configuration_options, json_option, resolve_options
from mortise.cli.output import document, print_json
from mortise.cli.speaker import is_speaker, own_launch
from mortise.errors import RequestError

if TYPE_CHECKING:
    from mortise.engine.events import Completion
    from mortise.engine.llm import LLM
    from mortise.engine.prompts import Prompt


SAMPLING_OPTIONS: Final = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "ignore_eos",
    "logprobs",
    "token_healing",
)
"""Options that are fields of ``SamplingParams``, by the same name."""

EXAMPLES = """\b
Examples:
  mortise generate "def fibonacci(n):"
  mortise generate --temperature 0.8 --top-p 0.95 --seed 7 "import "
  mortise generate --draft 2 "class Stack:"
  git diff | mortise generate --model models/my-model --chat -
"""


@click.command(short_help="Continue a prompt.", epilog=EXAMPLES)
@click.argument("prompt", required=False)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="One more prompt.")
@click.option(
    "--prompts-file",
    metavar="FILE",
    help='One prompt a line, as JSON: "text", {"prompt": "text"} or {"token_ids": [1, 2]}.',
)
@click.option("--chat", is_flag=True, help="Take each prompt as a message to a chat model.")
@click.option(
    "--max-tokens", type=int, help="Tokens to generate.  [default: 128, or what the context leaves]"
)
@click.option(
    "--temperature", type=float, help="Spread of the choice; 0 takes the most likely token."
)
@click.option(
    "--top-p",
    type=float,
    help="Choose among the likeliest tokens that together reach this probability.",
)
@click.option("--top-k", type=int, help="Choose among this many likeliest tokens; 0 is all.")
@click.option("--seed", type=int, help="Repeat the random choices of a run.  [default: a new one]")
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="End before this text; may be given repeatedly."
)
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end of text.")
@click.option(
    "--token-healing/--no-token-healing",
    default=None,
    help="Choose the last token of a text again, so that its last word or sign can go on.",
)
@click.option("--logprobs", type=int, help="With --json: log-probabilities of this many tokens.")
@click.option("--no-echo", is_flag=True, help="Print the completion without its prompt.")
@click.option("--quiet", is_flag=True, help="Print no timings.")
@configuration_options
@json_option
def generate(prompt: str | None, as_json: bool, **options: Any) -> None:
    """Continue PROMPT, or what standard input holds if there is none or it is "-".

    The text appears on standard output as it is generated, after its prompt; timings follow on
    standard error. Several prompts run together and are printed in their order.

    Where --temperature, --top-p, --top-k and --token-healing are not given, tokens are chosen as
    the model's generation_config.json recommends, and greedily if it recommends nothing.
    """
    from mortise.cli.completion_stream import show_completions, show_stream, show_timings
    from mortise.cli.prompts import read_prompts
    from mortise.cli.session import load_llm
    from mortise.engine.sampling_params import SamplingParams
    from mortise.parallel.collectives import all_gather_objects

    asked = {name: options[name] for name in SAMPLING_OPTIONS if options[name] is not None}
    SamplingParams(**asked)  # a wrong value is refused before anything is loaded
    if options["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs shows nothing without --json")
    resolved = resolve_options(options)
    # One process has the standard input; the others are given what it read.
    given = []
    if is_speaker(own_launch()):
        given = read_prompts(prompt, options["prompts"], options["prompts_file"])
    llm = load_llm(resolved)
    given = all_gather_objects(llm.group, given)[0]
    sampling = replace(llm.default_sampling, **asked)
    prompts = [_chat_prompt(llm, message) for message in given] if options["chat"] else given
    echo = not (options["no_echo"] or options["chat"])
    if as_json or llm.group.world_size > 1:
        completions = llm.generate(prompts, sampling)
        if as_json:
            print_json(_document(llm, completions))
            return
        show_completions(completions, echo=echo)
    else:
        generation = llm.stream(prompts, sampling)
        show_stream(generation, echo=echo)
        completions = generation.completions()
    if not options["quiet"] and is_speaker(own_launch()):
        show_timings(llm, sampling, completions)


def _chat_prompt(llm: LLM, message: str | list[int]) -> Prompt:
    if not isinstance(message, str):
        raise RequestError(
            f"token ids are given as a chat message: {message[:8]}",
            expected="texts, which the chat template makes a conversation of",
            remedy="leave out --chat, or give texts",
        )
    return llm.chat_prompt([{"role": "user", "content": message}])


def _document(llm: LLM, completions: list[Completion]) -> dict[str, Any]:
    """The document of ``generate --json``."""
    from mortise.cli.drafting import draft_fields

    loaded = llm.loaded
    return document(
        model=str(loaded.directory.path),
        backend=loaded.bound.row.name,
        emulated=loaded.bound.ops.backend.emulated,
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        fallbacks=[decision.subject for decision in loaded.bound.fallbacks],
        draft=draft_fields(llm),
        load_seconds=loaded.seconds,
        warmup_seconds=llm.warmup_seconds,
        completions=[_completion(completion) for completion in completions],
    )


def _completion(completion: Completion) -> dict[str, Any]:
    from mortise.cli.drafting import drafting_fields

    timings, logprobs = completion.timings, completion.logprobs
    return {
        "index": completion.index,
        "prompt": completion.prompt,
        "prompt_token_ids": list(completion.prompt_token_ids),
        "healed_token_id": completion.healed_token_id,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stopped_by": completion.stopped_by,
        "seed": completion.seed,
        "logprobs": None
        if logprobs is None
        else [
            {"token": entry.token, "top": [list(pair) for pair in entry.top]} for entry in logprobs
        ],
        "drafting": drafting_fields(completion.drafting),
        "timings": {
            "first_token_seconds": timings.first_token,
            "total_seconds": timings.total,
            "prompt_tokens": timings.prompt_tokens,
            "generated_tokens": timings.generated_tokens,
            "tokens_per_second": timings.tokens_per_second,
        },
    }
