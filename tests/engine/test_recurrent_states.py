"""Models that keep a state for each request: whatever happens, each request gets its own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mortise import LLM, EngineConfig, SamplingParams
from mortise.config import CacheConfig, SchedulerConfig
from mortise.errors import CapacityError, MissingTensorError, UnexpectedTensorError
from mortise.layers.gated_delta_net import GatedDeltaNet
from mortise.layers.linear import QuantizedLinear
from tests.cli.command_line import mortise
from tests.engine.rank_program import PROMPTS, results
from tests.fixtures.drafted_models import save_drafted
from tests.fixtures.launched import launch
from tests.fixtures.tiny_models import save_tiny

if TYPE_CHECKING:
    from pathlib import Path

NEXT, MOE_TEXT = "qwen3_next", "qwen3_5_moe_text"
GREEDY = SamplingParams(max_tokens=75, ignore_eos=True)
LONG = [[(7 * place + number) % 256 for place in range(60)] for number in range(5)]


def hybrid_llm(path: Path, *, pages: int = 64, seqs: int = 8, tokens: int = 512) -> LLM:
    return LLM(
        EngineConfig(
            model=path,
            dtype="float32",
            cache=CacheConfig(num_pages=pages),
            scheduler=SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens),
        )
    )


@pytest.fixture(scope="module", params=[NEXT, MOE_TEXT])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), model_type=request.param, tokenizer=True)


@pytest.fixture(scope="module")
def greedy(model: Path) -> list[tuple[int, ...]]:
    """The tokens of every prompt, each run by itself."""
    llm = hybrid_llm(model)
    return [llm.generate([prompt], GREEDY)[0].token_ids for prompt in LONG]


def tokens_of(llm: LLM, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in llm.generate(prompts, GREEDY)]


def test_a_preempted_request_generates_the_same(
    model: Path, greedy: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five requests of three pages each in seven pages; slots go from one to another."""
    preempted = []
    llm = hybrid_llm(model, pages=7, tokens=32)
    preempt = llm._engine.scheduler._preempt
    monkeypatch.setattr(
        llm._engine.scheduler,
        "_preempt",
        lambda request: (preempted.append(request.id), preempt(request)),
    )
    assert tokens_of(llm, LONG) == greedy
    assert len(preempted) > 1


def test_more_requests_than_slots(model: Path, greedy: list[tuple[int, ...]]) -> None:
    llm = hybrid_llm(model, seqs=2, tokens=24)
    assert tokens_of(llm, LONG) == greedy
    assert tokens_of(llm, LONG[::-1]) == greedy[::-1], "slots that were given back"


def test_scoring_while_all_slots_but_one_are_taken(
    model: Path, greedy: list[tuple[int, ...]]
) -> None:
    llm = hybrid_llm(model, seqs=2)
    expected = llm.logits(LONG[2])
    generation = llm.stream(LONG[:2], [GREEDY] * 2)
    for number, _ in enumerate(generation):
        if number in {0, 3, 50}:
            assert torch.equal(llm.logits(LONG[2]), expected)
    assert [one.token_ids for one in generation.completions()] == greedy[:2]


def test_what_the_states_take_is_a_decision(model: Path) -> None:
    llm = hybrid_llm(model, seqs=3)
    (decision,) = [one for one in llm.decisions if one.subject == "recurrent states"]
    states = llm.loaded.pool.states
    assert states.num_slots == 4
    # Two layers: three rows of 80 channels, and four heads of 12 by 8, all in float32.
    assert states.num_bytes == 4 * 2 * (3 * 80 + 4 * 12 * 8) * 4 == 19968
    assert decision.value == "4 slots, 19.5 KiB"
    assert "scheduler.max_num_seqs 3" in decision.reason
    (cache,) = [one for one in llm.decisions if one.subject == "cache"]
    assert cache.value == "64 pages, 2.0 MiB"


def test_what_verifying_takes_is_a_decision_where_something_drafts(tmp_path: Path) -> None:
    path = save_drafted(tmp_path / "drafted", model_type=NEXT)
    with_draft = LLM(model=path, scheduler={"max_num_seqs": 3}, draft={"num_tokens": 2})
    (decision,) = [one for one in with_draft.decisions if one.subject == "states while verifying"]
    # Three tokens of three requests, each a quarter of the four slots.
    states = with_draft.loaded.pool.states
    assert (
        decision.value == f"up to {states.num_bytes / 4 * 9 / 1024:.1f} KiB for the time of a pass"
    )
    assert "3 tokens of scheduler.max_num_seqs 3 requests" in decision.reason
    assert not [one for one in LLM(model=path).decisions if "verifying" in one.subject]


def test_a_model_without_recurrent_layers_has_no_such_decision(tiny_model: Path) -> None:
    assert not [one for one in LLM(model=tiny_model).decisions if one.subject == "recurrent states"]


def test_states_that_do_not_fit_are_an_error_that_says_so(model: Path) -> None:
    with pytest.raises(CapacityError, match="recurrent states") as caught:
        hybrid_llm(model, seqs=10**12)
    message = str(caught.value)
    assert "1000000000001 recurrent states" in message
    assert "scheduler.max_num_seqs" in message


def test_mtp_tensors_are_left_with_the_reason(model: Path, tmp_path: Path) -> None:
    changed = with_tensors(model, tmp_path, {"mtp.fc.weight": torch.ones(48, 96)})
    llm = hybrid_llm(changed)
    (decision,) = [one for one in llm.decisions if one.subject == "weights" and one.rule == "skip"]
    assert decision.value == "1 tensors not loaded"
    assert "multi-token prediction" in decision.reason


@pytest.mark.parametrize(
    "name", ["model.layers.0.linear_attn.in_proj_q.weight", "mtpx.weight", "lm_head.bias"]
)
def test_unknown_tensors_are_errors(model: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UnexpectedTensorError, match=name.replace(".", r"\.")):
        hybrid_llm(with_tensors(model, tmp_path, {name: torch.ones(2, 2)}))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.linear_attn.A_log",
        "model.layers.0.linear_attn.dt_bias",
        "model.layers.2.linear_attn.conv1d.weight",
        "model.layers.2.linear_attn.norm.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.mlp.shared_expert_gate.weight",
    ],
)
def test_missing_tensors_are_errors(model: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(MissingTensorError, match=name.replace(".", r"\.")):
        hybrid_llm(with_tensors(model, tmp_path, {name: None}))


def with_tensors(model: Path, folder: Path, changed: dict[str, torch.Tensor | None]) -> Path:
    """A copy with some tensors added, and those that are None left out."""
    tensors = {**load_file(model / "model.safetensors"), **changed}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((model / "config.json").read_text())
    return folder


def test_a_quantised_copy_loads_and_generates(model: Path, tmp_path: Path) -> None:
    outcome = mortise("quantize", tmp_path / "fp8", "--model", model, "--scheme", "fp8-block")
    assert outcome.code == 0, outcome.stderr
    exact, llm = hybrid_llm(model), hybrid_llm(tmp_path / "fp8", tokens=17)
    nets = [net for net in llm.loaded.model.modules() if isinstance(net, GatedDeltaNet)]
    assert len(nets) == 2
    assert all(isinstance(net.out_proj, QuantizedLinear) for net in nets)
    expected, got = exact.logits(LONG[0]), llm.logits(LONG[0])
    difference = float((got - expected).abs().mean() / expected.abs().mean())
    # Three bits of mantissa in every layer of a random model; unrelated logits differ by 1.4.
    assert 1e-4 < difference < 0.5
    # The first token is of that very pass; later ones hang on the last bit of what is rounded.
    (generated,) = tokens_of(llm, LONG[:1])
    assert generated[0] == int(got[-1].argmax())
    assert len(generated) == GREEDY.max_tokens


def test_ranks_that_share_the_experts_give_what_one_process_gives(tmp_path: Path) -> None:
    """With one prompt the other rank is idle: it keeps nothing of anybody and takes part."""
    config: dict[str, Any] = {
        "model": str(save_tiny(tmp_path / "model", model_type=NEXT, tokenizer=False)),
        "dtype": "float32",
    }
    cases = [{"config": config, "num_prompts": number} for number in (1, len(PROMPTS))]
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases), encoding="utf-8")
    ended = launch([["-m", "tests.engine.rank_program", "cases", str(file)]] * 2)
    assert [one.code for one in ended] == [0, 0], ended[0].stderr
    *found, _ = json.loads(ended[0].stdout)
    llm = LLM(EngineConfig(**config))
    for case, shared in zip(cases, found, strict=True):
        alone = results(llm, case["num_prompts"])
        assert shared["tokens"] == [list(tokens) for tokens in alone["tokens"]]
        torch.testing.assert_close(
            torch.tensor(shared["last"]), torch.tensor(alone["last"]), rtol=1e-4, atol=1e-4
        )
