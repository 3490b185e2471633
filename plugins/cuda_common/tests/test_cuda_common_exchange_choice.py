"""Who carries a layer's rows between processes, and which builds of DeepEP can be called."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures.cuda_ranks import runtime_of
from tests.fixtures.dispatch_formats import FORMATS

from mortise.errors import BackendUnusableError
from mortise.plugin import (
    NOT_SUPPORTED,
    DispatchFormat,
    DispatchMode,
    ModelRole,
    ReasonCode,
    Routing,
    RowLayout,
    TokenDispatcherRequest,
)
from mortise_cuda_common import exchanges as exchanges_module
from mortise_cuda_common.dispatchers.expansion import expansion
from mortise_cuda_common.dispatchers.low_latency import LowLatencyExchange
from mortise_cuda_common.dispatchers.normal import NormalExchange
from mortise_cuda_common.dispatchers.repetition import first_naming, without_repetition
from mortise_cuda_common.emulator.deep_ep import EmulatedDeepEP
from mortise_cuda_common.environment import QUEUE_DEPTH, VendorEnvironment, read_environment
from mortise_cuda_common.exchange_limits import queue_depth, refusal
from mortise_cuda_common.exchanges import Exchanges
from mortise_cuda_common.libraries import deep_ep
from mortise_cuda_common.libraries.deep_ep import CALLED, DeepEP, require_installed

if TYPE_CHECKING:
    from collections.abc import Callable

    from mortise_cuda_common.runtime import Runtime

NORMAL, LOW_LATENCY = DispatchMode.NORMAL, DispatchMode.LOW_LATENCY
UNSET = VendorEnvironment()
SMS = 132


def format_of(name: str, mode: DispatchMode) -> DispatchFormat:
    aligned = mode is NORMAL
    return replace(
        FORMATS[name],
        mode=mode,
        row_layout=RowLayout.GROUPED_ALIGNED if aligned else RowLayout.MASKED,
        alignment=128 if aligned else 1,
    )


REQUEST = TokenDispatcherRequest(
    role=ModelRole.MAIN,
    layer="model.layers.3.mlp",
    num_experts=64,
    num_experts_per_tok=8,
    hidden_size=7168,
    world_size=8,
    max_tokens_per_rank=128,
    format=format_of("bf16", NORMAL),
    process_group=SimpleNamespace(rank=lambda: 0, size=lambda: 8),
)
FAST = replace(REQUEST, mode=LOW_LATENCY, format=format_of("fp8 under float32", LOW_LATENCY))


def silicon() -> Runtime:
    """As if a device were here."""
    return replace(runtime_of(), emulated=False)


def exchanges_of(choice: Any = "auto", runtime: Runtime | None = None) -> Exchanges:
    return Exchanges(runtime or runtime_of(), choice, "cuda_hopper", UNSET)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other rank is asked."""
    monkeypatch.setattr(exchanges_module, "_every_rank", lambda request, own: own)


# What the library carries.


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": FORMATS["fp32"]}, "it carries no fp32 rows"),
        ({"format": FORMATS["int8"]}, "it carries no int8 rows"),
        ({"format": FORMATS["nvfp4"]}, "it carries no nvfp4 rows"),
        ({"format": None}, "is not decided yet"),
        ({"format": FAST.format}, "its normal exchange has no masked rows"),
        ({"world_size": 6, "num_experts": 60}, "and there are 6"),
        ({"world_size": 7}, "64 experts are not shared evenly by 7 processes"),
        ({"hidden_size": 7169}, "hidden sizes that are a multiple of 8"),
        (
            {"hidden_size": 200, "format": format_of("fp8 under float32", NORMAL)},
            "hidden sizes that are a multiple of 128, and this model has 200",
        ),
        ({"num_experts": 8 * 1025}, "1024 experts of a process, and there are 1025"),
    ],
)
def test_what_the_normal_exchange_does_not_carry(changes: dict[str, Any], reason: str) -> None:
    found = refusal(replace(REQUEST, **changes), SMS, UNSET)
    assert found is not None
    assert reason in found.reason
    assert found.expected is ("fp32" in reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": REQUEST.format}, "its low_latency exchange has no grouped_aligned rows"),
        ({"hidden_size": 1024}, "takes hidden sizes 2048, 2560, 3072, 4096, 5120, 6144, 7168"),
        ({"num_experts_per_tok": 12}, "takes 11 experts of a token, and there are 12"),
        ({"world_size": 12, "num_experts": 60}, "fewer than 8 processes or a multiple of it"),
        ({"num_experts": 1856}, "takes 1848 experts on this chip, and there are 1856"),
        ({"world_size": 2, "max_tokens_per_rank": 3}, "2 processes of 3 have 6"),
        ({"max_tokens_per_rank": 512}, "needs queues of 1026 for dispatch.max_tokens_per_rank 512"),
        ({"max_tokens_per_rank": 0}, "8 processes of 0 have 0"),
    ],
)
def test_what_the_low_latency_exchange_does_not_carry(changes: dict[str, Any], reason: str) -> None:
    found = refusal(replace(FAST, **changes), SMS, UNSET)
    assert found is not None
    assert reason in found.reason


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST,
        FAST,
        replace(REQUEST, hidden_size=1024, world_size=4),
        replace(REQUEST, world_size=16),
        replace(FAST, world_size=7, num_experts=63, max_tokens_per_rank=4),
        replace(FAST, max_tokens_per_rank=511),
        replace(FAST, hidden_size=3072, num_experts_per_tok=11),
    ],
)
def test_what_it_carries(request_: TokenDispatcherRequest) -> None:
    assert refusal(request_, SMS, UNSET) is None


def test_deeper_queues_take_more_tokens_and_no_number_is_told() -> None:
    more = replace(FAST, max_tokens_per_rank=1024)
    found = refusal(more, SMS, UNSET)
    assert found is not None
    assert f"at most 511, or {QUEUE_DEPTH} to at least 2050" in found.remedy
    assert refusal(more, SMS, VendorEnvironment(queue_depth="2050")) is None
    wrong = refusal(more, SMS, VendorEnvironment(queue_depth="deep"))
    assert wrong is not None
    assert f"{QUEUE_DEPTH} is 'deep', not a number" in wrong.reason


def test_the_variable_is_read_and_one_set_to_nothing_is_not_set() -> None:
    assert queue_depth(read_environment({})) == queue_depth(read_environment({QUEUE_DEPTH: " "}))
    assert queue_depth(read_environment({})) == 1024
    assert queue_depth(read_environment({QUEUE_DEPTH: "4096"})) == 4096


# Who is chosen.


def test_the_emulated_library_is_chosen_where_it_carries_the_rows() -> None:
    ours = exchanges_of()
    assert isinstance(ours.create_token_dispatcher(REQUEST), NormalExchange)
    assert isinstance(ours.create_token_dispatcher(FAST), LowLatencyExchange)
    ours.create_token_dispatcher(replace(REQUEST, layer="another"))
    assert len(ours._connections) == 1


def test_the_core_sends_what_deep_ep_does_not_and_says_why_once() -> None:
    small = replace(FAST, hidden_size=256)
    ours = exchanges_of()
    with pytest.warns(RuntimeWarning, match="takes hidden sizes 2048"):
        assert ours.create_token_dispatcher(small) is NOT_SUPPORTED
    # A second warning would be an error here.
    assert ours.create_token_dispatcher(replace(small, layer="another")) is NOT_SUPPORTED
    assert exchanges_of("portable").create_token_dispatcher(small) is NOT_SUPPORTED
    with pytest.raises(BackendUnusableError) as caught:
        exchanges_of("deep_ep").create_token_dispatcher(small)
    assert caught.value.reason is ReasonCode.REQUEST_UNSUPPORTED
    assert "layer model.layers.3.mlp: DeepEP does not carry its rows" in str(caught.value)
    assert "option exchange of backend cuda_hopper is 'deep_ep'" in str(caught.value)


def test_float32_rows_are_left_to_the_core_without_a_word() -> None:
    plain = replace(REQUEST, format=FORMATS["fp32"])
    assert exchanges_of().create_token_dispatcher(plain) is NOT_SUPPORTED


def test_a_library_that_is_missing_is_named() -> None:
    with pytest.warns(RuntimeWarning, match=r"deep_ep is not installed .*deepseek-ai/DeepEP"):
        made = exchanges_of(runtime=silicon()).create_token_dispatcher(REQUEST)
    assert made is NOT_SUPPORTED
    with pytest.raises(BackendUnusableError, match="deep_ep is not installed") as caught:
        exchanges_of("deep_ep", silicon()).create_token_dispatcher(REQUEST)
    assert "build DeepEP" in (caught.value.remedy or "")


def test_a_library_that_cannot_be_imported_is_told_with_its_cause(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep_ep.py").write_text("raise OSError('libnvshmem_host.so.3: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(RuntimeWarning, match=r"OSError: libnvshmem_host\.so\.3: cannot open"):
        made = exchanges_of(runtime=silicon()).create_token_dispatcher(REQUEST)
    assert made is NOT_SUPPORTED
    with pytest.raises(BackendUnusableError, match=r"cannot be imported: OSError: libnvshmem"):
        exchanges_of("deep_ep", silicon()).create_token_dispatcher(REQUEST)


def test_an_installed_library_is_imported_and_used(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "deep_ep.py").write_text("")
    chip = silicon().chip
    standing_in = ModuleType("deep_ep")
    vars(standing_in).update(Buffer=EmulatedDeepEP(chip).Buffer, __version__="2.1.0")
    monkeypatch.setitem(sys.modules, "deep_ep", standing_in)
    monkeypatch.setattr(deep_ep, "require_installed", lambda: "2.1.0")
    assert DeepEP.load().version == "2.1.0"
    made = exchanges_of("deep_ep", silicon()).create_token_dispatcher(REQUEST)
    assert isinstance(made, NormalExchange)


def older_library(monkeypatch: pytest.MonkeyPatch, **members: Any) -> None:
    """A library whose Buffer has other members than the emulated one."""
    buffer = type("Buffer", (EmulatedDeepEP(runtime_of().chip).Buffer,), members)
    library = DeepEP.of(SimpleNamespace(Buffer=buffer), "1.2.1")
    monkeypatch.setattr(DeepEP, "emulated", lambda chip, depth: library)


def test_a_number_of_ranks_without_a_table_is_left_to_the_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_table(num_ranks: int) -> None:
        raise AssertionError(f"Unsupported number of EP ranks: {num_ranks}")

    older_library(monkeypatch, get_dispatch_config=staticmethod(no_table))
    many = replace(REQUEST, world_size=48, num_experts=96)
    with pytest.warns(RuntimeWarning, match="Unsupported number of EP ranks: 48"):
        assert exchanges_of().create_token_dispatcher(many) is NOT_SUPPORTED


def test_a_buffer_that_cannot_be_opened_is_told_with_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(
        self: object,
        group: object,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
    ) -> None:
        raise RuntimeError("nvshmem_init:\n  no IB device")

    older_library(monkeypatch, __init__=fail)
    made = exchanges_of().create_token_dispatcher(REQUEST)
    assert isinstance(made, NormalExchange)
    hidden = torch.zeros(1, 7168, dtype=torch.bfloat16)
    routing = Routing(topk_ids=torch.zeros(1, 8, dtype=torch.int64), topk_weights=torch.ones(1, 8))
    with pytest.raises(BackendUnusableError, match="nvshmem_init: no IB device") as told:
        made.dispatch(hidden, routing, REQUEST.format)
    assert "bytes over NVLink" in str(told.value)
    assert told.value.reason is ReasonCode.CREATE_FAILED


# Which builds can be called.


def versions(found: dict[str, str]) -> Callable[[str], str]:
    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    return version


@pytest.mark.parametrize("name", deep_ep.DISTRIBUTIONS)
def test_the_installed_version_is_found_under_either_name(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep_ep.py").write_text("raise AssertionError('it must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "version", versions({name: "1.2.1+9af0e0d"}))
    assert require_installed() == "1.2.1+9af0e0d"
    monkeypatch.setattr(importlib.metadata, "version", versions({}))
    assert require_installed() == "of unknown version"


def test_the_placeholder_of_the_package_index_is_no_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", versions({"deep-ep": "1.0.0"}))
    with pytest.raises(BackendUnusableError, match="is a placeholder without the library") as told:
        require_installed()
    assert (told.value.remedy or "").startswith("uninstall it")


class SimpleFunction:
    """Something to be called, whose arguments are what it says."""

    __signature__: inspect.Signature

    def __call__(self) -> None: ...


def without(method: str, argument: str | None = None) -> Any:
    """A build whose Buffer lacks a method, or one of its arguments."""
    members = {}
    if argument is not None:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = [name for name in CALLED[method] if name != argument]
        function = SimpleFunction()
        function.__signature__ = inspect.Signature([inspect.Parameter(one, kind) for one in names])
        members[method] = function
    buffer = EmulatedDeepEP(runtime_of().chip).Buffer
    made = {name: getattr(buffer, name) for name in CALLED if name != method}
    return SimpleNamespace(Buffer=type("Buffer", (), {**made, **members}))


@pytest.mark.parametrize("method", [name for name in CALLED if name != "__init__"])
def test_a_build_without_a_method_is_refused(method: str) -> None:
    with pytest.raises(BackendUnusableError, match=f"deep_ep 3 has no Buffer.{method}") as told:
        DeepEP.of(without(method), "3")
    assert "v1.2.1 or later" in (told.value.remedy or "")


@pytest.mark.parametrize(
    ("method", "argument"),
    [("low_latency_dispatch", "use_ue8m0"), ("dispatch", "topk_weights"), ("combine", "handle")],
)
def test_a_build_without_an_argument_is_refused(method: str, argument: str) -> None:
    with pytest.raises(BackendUnusableError, match=f"a Buffer.{method} without {argument}"):
        DeepEP.of(without(method, argument), "1.0")


def test_a_build_of_v2_alone_is_refused() -> None:
    with pytest.raises(BackendUnusableError, match=re.escape("has ElasticBuffer alone")):
        DeepEP.of(SimpleNamespace(ElasticBuffer=object), "2.1.0")
    with pytest.raises(BackendUnusableError, match="has no class Buffer"):
        DeepEP.of(SimpleNamespace(), "0")


def test_numbers_of_experts_are_as_wide_as_the_build_has_them() -> None:
    module = EmulatedDeepEP(runtime_of().chip)
    assert DeepEP.of(module, "1").id_dtype is torch.int64
    narrow = SimpleNamespace(Buffer=module.Buffer, topk_idx_t=torch.int32)
    assert DeepEP.of(narrow, "1").id_dtype is torch.int32
    assert DeepEP.of(SimpleNamespace(Buffer=module.Buffer), "1").id_dtype is torch.int64


# Where rows go.


drawn_ids = st.integers(1, 4).flatmap(
    lambda choices: st.tuples(
        st.integers(1, 6),
        st.lists(st.lists(st.integers(-1, 5), min_size=choices, max_size=choices), max_size=8),
    )
)


@settings(max_examples=60, deadline=None)
@given(drawn_ids, st.sampled_from([1, 4]))
def test_every_choice_of_a_local_expert_gets_a_row(drawn: Any, alignment: int) -> None:
    num_experts, rows = drawn
    ids = torch.tensor(rows, dtype=torch.int64).view(len(rows), len(rows[0]) if rows else 1)
    ids = ids.clamp(max=num_experts - 1)
    counts = [int((ids == expert).sum()) for expert in range(num_experts)]
    places = expansion(ids, counts, alignment)
    begins, begin = [], 0
    for count in counts:
        begins.append(begin)
        begin += -(-count // alignment) * alignment
    assert len(places.sources) == begin
    seen = set()
    for row, of_row in enumerate(ids.tolist()):
        for choice, expert in enumerate(of_row):
            place = int(places.row_of_NK[row, choice])
            if expert < 0:
                assert place == -1
                continue
            assert begins[expert] <= place < begins[expert] + counts[expert]
            assert int(places.sources[place]) == row
            seen.add(place)
    assert len(seen) == sum(counts)
    # Rows of an expert keep their order.
    for expert, count in enumerate(counts):
        of_expert = places.sources[begins[expert] : begins[expert] + count]
        assert bool((of_expert.diff() >= 0).all())


def test_float8_rows_can_be_moved() -> None:
    ids = torch.tensor([[1, 0], [0, -1]])
    rows = torch.tensor([[1.5], [-2.0]]).to(torch.float8_e4m3fn)
    moved = expansion(ids, (2, 1), 1).apply(rows)
    assert moved.dtype is torch.float8_e4m3fn
    assert moved.float().flatten().tolist() == [1.5, -2.0, 1.5]


@settings(max_examples=40, deadline=None)
@given(drawn_ids)
def test_an_expert_keeps_the_first_choice_that_names_it(drawn: Any) -> None:
    _, rows = drawn
    ids = torch.tensor(rows, dtype=torch.int64).view(len(rows), len(rows[0]) if rows else 1)
    for row, kept, first in zip(
        rows, without_repetition(ids).tolist(), first_naming(ids).tolist(), strict=True
    ):
        assert first == [row.index(expert) for expert in row]
        chosen = [expert for expert in kept if expert >= 0]
        assert chosen == list(dict.fromkeys(expert for expert in row if expert >= 0))
