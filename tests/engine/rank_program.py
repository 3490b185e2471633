"""What one of several processes does in a test: run models one after the other, as it is told."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mortise import LLM, EngineConfig, SamplingParams
from mortise.env import Launch, read_launch
from mortise.errors import ParallelError, RequestError

PROMPTS = ([5, 6, 7, 8, 9] * 9, [1, 2, 3], [11] * 20, [42, 7])
"""One longer than the tiny model's ``index_topk``, one short, one with repeated tokens."""
SEQUENCE = list(range(40, 80))
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)


def results(llm: LLM, num_prompts: int) -> dict[str, Any]:
    """The tokens of some prompts, greedy and drawn, and the logits of a sequence."""
    prompts = list(PROMPTS[:num_prompts])
    drawn = replace(GREEDY, temperature=1.0, seed=7, logprobs=1)
    completions = llm.generate(prompts, GREEDY) + llm.generate(prompts, drawn)
    return {
        "tokens": [completion.token_ids for completion in completions],
        "order": [completion.index for completion in completions],
        "last": llm.logits(SEQUENCE)[-1].tolist(),
        "formats": sorted(
            {
                decision.value
                for decision in llm.decisions
                if decision.subject.endswith(".mlp") and "projections" not in decision.value
            }
        ),
    }


def run_cases(path: str) -> None:
    """Every case of a file, all in the same order on every rank."""
    cases = json.loads(Path(path).read_text(encoding="utf-8"))
    found = []
    for case in cases:
        with LLM(EngineConfig(**case["config"]), launch=own_launch()) as llm:
            found.append(results(llm, case["num_prompts"]))
            if case is cases[-1]:
                # Only the first rank would have run it, and every rank refuses it.
                found.append(refusal(llm, [[1] * 600, [2]]))
    print(json.dumps(found))


def refusal(llm: LLM, prompts: list[list[int]]) -> str:
    """What is said of prompts that cannot be served."""
    try:
        llm.generate(prompts, GREEDY)
    except RequestError as error:
        return error.what
    return "served"


def lose_a_rank(model: str, manner: str) -> None:
    """The last rank dies, fails or stops while the others wait for it."""
    launch = own_launch()
    config = EngineConfig(model=model, dtype="float32", parallel={"timeout_seconds": 6})
    with LLM(config, launch=launch) as llm:
        llm.generate(list(PROMPTS), GREEDY)
        if launch.rank == launch.world_size - 1:
            match manner:
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "raises":
                    raise ValueError("a fault in the last rank")
                case "sleeps":
                    time.sleep(12)
        print(time.monotonic(), flush=True)
        try:
            llm.generate(list(PROMPTS), GREEDY)
        except ParallelError as error:
            print(time.monotonic())
            print(error)


def own_launch() -> Launch:
    """This process's place."""
    launch = read_launch()
    assert launch is not None
    return launch


if __name__ == "__main__":
    {"cases": run_cases, "loss": lose_a_rank}[sys.argv[1]](*sys.argv[2:])
