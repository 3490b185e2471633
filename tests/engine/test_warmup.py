"""Everything is compiled before anybody waits for a token: once, in parallel, or with one error."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest
import torch

from mortise import LLM
from mortise.config import CacheConfig, DraftConfig, SchedulerConfig
from mortise.engine.warmup import WarmupReport, run_jobs
from mortise.errors import CapacityError, ContractError, WarmupError
from mortise.layers.gated_delta_net import GatedDeltaNet
from mortise.layers.in_use import qkv_shapes_in_use
from mortise.parallel.group import ExpertParallelGroup
from mortise.reference.backend import ReferenceBackend
from mortise.spec.dispatch import DispatchMode
from mortise.spec.paged_mqa import IndexKeyDtype
from mortise.spec.qkv import QKVLayout, QKVShape
from mortise.spec.reasons import ReasonCode
from mortise.spec.roles import ModelRole
from mortise.spec.warmup import WarmupJob, WarmupRequest
from mortise.spec.weights import WeightScheme
from tests.cli.command_line import mortise
from tests.fixtures import warmup_stories
from tests.fixtures.paged_models import reference_context
from tests.fixtures.ranks import Raised, launches, run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

Answers = "Callable[[Callable[[WarmupRequest], object]], None]"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[WarmupRequest], object]], None]:
    """Let the reference compile what a function says."""

    def answers(function: Callable[[WarmupRequest], object]) -> None:
        monkeypatch.setattr(ReferenceBackend, "warmup", lambda _self, request: function(request))

    return answers


def job(name: str, run: Callable[[], None], key: object = None) -> WarmupJob:
    return WarmupJob(name=name, key=name if key is None else key, run=run)


def run(jobs: Sequence[WarmupJob], threads: int | None = None, **options: object) -> WarmupReport:
    return run_jobs(jobs, backend="quick", threads=threads, group=ExpertParallelGroup(), **options)


def fail(error: Exception) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


# Running jobs.


def test_jobs_run_at_the_same_time() -> None:
    """Each waits for the other, which one after the other would be for ever."""
    meeting = threading.Barrier(2, timeout=20)
    report = run([job("left", meeting.wait), job("right", meeting.wait)], threads=2)
    assert [one.name for one in report.jobs] == ["left", "right"]
    assert report.threads == 2


def test_no_more_than_asked_for_at_a_time() -> None:
    running, most = [], []

    def count() -> None:
        running.append(1)
        most.append(len(running))
        time.sleep(0.005)
        running.pop()

    assert run([job(str(number), count) for number in range(6)], threads=1).threads == 1
    assert max(most) == 1
    assert len(most) == 6


def test_a_job_can_call_what_a_pass_calls() -> None:
    """Weights are parameters; outside inference mode each call would remember its inputs."""
    weight, modes = torch.nn.Parameter(torch.ones(2, 2)), []
    run([job("product", lambda: modes.append((weight @ weight).is_inference()))])
    assert modes == [True]


def test_the_report_says_how_long_each_took() -> None:
    report = run([job("nap", lambda: time.sleep(0.05)), job("none", lambda: None)], threads=2)
    nap, none = report.jobs
    assert nap.seconds >= 0.05 > none.seconds
    assert report.seconds >= nap.seconds


def test_progress_begins_at_nothing_and_ends_at_all() -> None:
    seen: list[tuple[int, int]] = []
    run(
        [job(str(number), lambda: None) for number in range(3)],
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[0] == (0, 3)
    assert seen[-1] == (3, 3)
    assert seen == sorted(seen)


def test_no_jobs() -> None:
    assert run([]).jobs == ()


def nap(ran: list[int]) -> Callable[[], None]:
    """Long enough that not all naps are over before the first failure is noticed."""

    def run() -> None:
        ran.append(1)
        time.sleep(0.01)

    return run


def test_a_failure_names_the_job_and_its_cause() -> None:
    ran: list[int] = []
    naps = [job(str(number), nap(ran)) for number in range(100)]
    with pytest.raises(WarmupError) as caught:
        run([job("fp8 product 7168 x 4096", fail(OSError("disk full"))), *naps], threads=1)
    error = caught.value
    assert error.what == "warming up failed at fp8 product 7168 x 4096: OSError: disk full"
    assert error.details[-1] == "backend quick"
    assert error.reason is ReasonCode.WARMUP_FAILED
    assert error.remedy
    assert len(ran) < 100, "everything was compiled although it was in vain"


def test_an_error_of_ours_keeps_its_own_words() -> None:
    own = CapacityError("no room", remedy="make some")
    with pytest.raises(CapacityError, match="no room") as caught:
        run([job("a kernel", fail(own))])
    assert caught.value.__notes__ == ["while warming up: a kernel (backend quick)"]


def test_an_interruption_drops_what_has_not_begun() -> None:
    ran: list[int] = []

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([job(str(n), nap(ran)) for n in range(100)], threads=1, progress=interrupt)
    assert len(ran) < 100


# Processes beside each other.


def test_ranks_wait_for_one_that_compiles_longer_than_they_wait_for_each_other() -> None:
    with launches(2) as every:
        outcomes = run_ranks(warmup_stories.compile_long_on_the_last, every)
    found = [None if outcome is None else outcome.result for outcome in outcomes]
    assert [len(one) for one in found] == [2, 2], found
    assert [num_jobs for num_jobs, _ in found] == [0, 2]
    assert all(seconds >= 1.5 * warmup_stories.TIMEOUT_SECONDS for _, seconds in found)


def test_ranks_hear_of_one_that_failed() -> None:
    with launches(2) as every:
        outcomes = run_ranks(warmup_stories.fail_on_the_first, every)
    failed, lost = (None if outcome is None else outcome.result for outcome in outcomes)
    assert isinstance(failed, Raised)
    assert failed.kind == "WarmupError"
    assert isinstance(lost, Raised)
    assert lost.kind == "RankLostError"
    assert "warming up failed at a kernel" in lost.text


# What a backend is told.


def requests_of(answers: Answers, **config: object) -> list[WarmupRequest]:
    seen: list[WarmupRequest] = []

    def remember(request: WarmupRequest) -> tuple[WarmupJob, ...]:
        seen.append(request)
        return ()

    answers(remember)
    LLM(**config)
    return seen


def test_it_is_told_what_the_model_uses(tiny_model: Path, answers: Answers) -> None:
    (request,) = requests_of(
        answers,
        model=tiny_model,
        index_key_dtype="fp8",
        scheduler=SchedulerConfig(max_num_batched_tokens=48, max_num_seqs=5),
    )
    assert request.role is ModelRole.MAIN
    assert [one.layer for one in request.experts] == ["model.layers.1.mlp", "model.layers.2.mlp"]
    assert set(request.dispatch) == {one.layer for one in request.experts}
    assert request.linears == ()
    assert request.modes == (DispatchMode.NORMAL,)
    assert request.max_tokens == 48
    assert request.num_experts_per_tok == 3
    assert request.world_size == 1
    assert request.compute_dtype is torch.float32
    assert (request.index_heads, request.index_head_dim) == (8, 32)
    assert request.index_key_dtype is IndexKeyDtype.FP8_E4M3
    assert request.qkv_shapes == ()
    assert not request.ahead


def test_it_is_told_of_quantised_projections(
    tiny_model: Path, tmp_path: Path, answers: Answers
) -> None:
    path = tmp_path / "int8"
    made = mortise("quantize", path, "--model", tiny_model, "--scheme", "w8a8")
    assert made.code == 0, made.stderr
    (request,) = requests_of(answers, model=path, scheduler=SchedulerConfig(max_num_seqs=900))
    assert request.max_tokens == 900
    assert {one.w13.scheme for one in request.experts} == {WeightScheme.W8A8}
    names = [one.layer for one in request.linears]
    assert "model.layers.0.self_attn.o_proj" in names
    assert len(names) == len(set(names))
    assert {one.stored.scheme for one in request.linears} == {WeightScheme.W8A8}
    assert all(one.prepared is not None for one in (*request.experts, *request.linears))


def test_it_is_told_of_the_draft_apart(answers: Answers) -> None:
    main, draft = requests_of(
        answers,
        scheduler=SchedulerConfig(max_num_batched_tokens=20, max_num_seqs=8),
        draft=DraftConfig(num_tokens=3),
    )
    assert [main.role, draft.role] == [ModelRole.MAIN, ModelRole.DRAFT]
    assert [one.layer for one in draft.experts] == ["model.layers.4.mlp"] == list(draft.dispatch)
    assert main.max_tokens == draft.max_tokens == 32, "what is verified of eight requests"
    assert (draft.index_heads, draft.index_head_dim) == (main.index_heads, main.index_head_dim)


def test_what_both_models_compile_is_compiled_for_each_binding(answers: Answers) -> None:
    ran: list[ModelRole] = []
    answers(lambda request: [job("a kernel", lambda: ran.append(request.role))] * 2)
    LLM(draft=DraftConfig(num_tokens=1), warmup_threads=1)
    assert ran == [ModelRole.MAIN, ModelRole.DRAFT]


def test_different_shapes_of_fused_projections_are_told_once() -> None:
    def layer(num_value_heads: int) -> GatedDeltaNet:
        shape = QKVShape(
            num_key_heads=2,
            num_value_heads=num_value_heads,
            key_head_dim=8,
            value_head_dim=8,
            layout=QKVLayout.CONTIGUOUS,
        )
        return GatedDeltaNet(
            0,
            reference_context(),
            "model.layers.0.linear_attn",
            hidden_size=16,
            shape=shape,
            conv_kernel_size=4,
            rms_norm_eps=1e-6,
        )

    model = torch.nn.ModuleList([layer(2), layer(4), layer(2)])
    assert [one.num_value_heads for one in qkv_shapes_in_use(model)] == [2, 4]


# Starting.


def warmups(llm: LLM) -> list[str]:
    return [one.value for one in llm.decisions if one.subject == "warm-up"]


def test_a_start_compiles_each_thing_once_before_it_is_ready(
    tiny_model: Path, answers: Answers
) -> None:
    ran: list[str] = []

    def jobs(request: WarmupRequest) -> list[WarmupJob]:
        assert not request.ahead
        return [
            job(one.layer, lambda one=one: ran.append(one.layer), key=one.hidden_size)
            for one in request.experts
        ]

    answers(jobs)
    llm = LLM(model=tiny_model, warmup_threads=3)
    assert ran == ["model.layers.1.mlp"]
    (value,) = warmups(llm)
    assert value.startswith("1 jobs in ")
    assert llm.warmup_seconds > 0


def test_it_can_be_left_for_later(tiny_model: Path, answers: Answers) -> None:
    ran: list[bool] = []
    answers(lambda request: [job("a kernel", lambda: ran.append(request.ahead))])
    llm = LLM(model=tiny_model, warm_up=False)
    assert ran == []
    assert warmups(llm) == ["1 jobs"]
    assert llm.warmup_seconds == 0
    llm.warm_up()
    llm.warm_up(ahead=True)
    assert ran == [False, True]


def test_a_backend_that_compiles_nothing_takes_no_decision(tiny_model: Path) -> None:
    assert warmups(LLM(model=tiny_model)) == []


def test_a_start_that_cannot_compile_fails(tiny_model: Path, answers: Answers) -> None:
    answers(lambda _request: [job("a kernel", fail(FileNotFoundError("no compiler")))])
    with pytest.raises(WarmupError, match="a kernel: FileNotFoundError: no compiler") as caught:
        LLM(model=tiny_model)
    assert "backend reference" in caught.value.details[-1]


@pytest.mark.parametrize("answer", [None, "abc", [1], {"a": 1}])
def test_an_answer_that_is_no_list_of_jobs_breaks_the_contract(
    tiny_model: Path, answers: Answers, answer: object
) -> None:
    answers(lambda _request: answer)
    with pytest.raises(ContractError, match=r"warmup\(\) of backend reference"):
        LLM(model=tiny_model, cache=CacheConfig(num_pages=1))


def test_an_exception_of_the_backend_says_where(tiny_model: Path, answers: Answers) -> None:
    def broken(_request: WarmupRequest) -> object:
        raise ZeroDivisionError

    answers(broken)
    with pytest.raises(ZeroDivisionError) as caught:
        LLM(model=tiny_model)
    assert caught.value.__notes__[0].startswith("in warmup of backend reference")
