"""Who carries a layer's rows, how DeepEP is told their format, and what its buffer must hold."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mortise.errors import BackendUnusableError, ConfigError
from mortise.plugin import (
    NOT_SUPPORTED,
    DispatchDtype,
    DispatchFormat,
    DispatchMode,
    ModelRole,
    ReasonCode,
    TokenDispatcherRequest,
)
from mortise_npu_ascend import exchange_library, exchanges, vendor
from mortise_npu_ascend.buffer_size import (
    ExchangeSize,
    configured_megabytes,
    required_megabytes,
)
from mortise_npu_ascend.emulator import Generation
from mortise_npu_ascend.emulator.deep_ep import EmulatedDeepEp
from mortise_npu_ascend.environment import (
    BUFFER,
    INT8_DISPATCH,
    OWN_BUFFER,
    VendorEnvironment,
    read_environment,
)
from mortise_npu_ascend.exchange_format import format_arguments
from mortise_npu_ascend.exchange_library import Refusal, refusal
from mortise_npu_ascend.exchanges import Exchanges
from mortise_npu_ascend.options import Options

if TYPE_CHECKING:
    from mortise_npu_ascend.vendor import Vendor

BF16, INT8 = DispatchDtype.BF16, DispatchDtype.INT8
NORMAL, LOW_LATENCY = DispatchMode.NORMAL, DispatchMode.LOW_LATENCY
FORCED = VendorEnvironment(int8_dispatch="1")
UNSET = VendorEnvironment()

REQUEST = TokenDispatcherRequest(
    role=ModelRole.MAIN,
    layer="model.layers.3.mlp",
    num_experts=64,
    num_experts_per_tok=8,
    hidden_size=7168,
    world_size=8,
    max_tokens_per_rank=128,
    format=DispatchFormat(dtype=BF16),
    process_group=SimpleNamespace(rank=lambda: 0, size=lambda: 8),
)


def silicon(generation: Generation = Generation.A3) -> Vendor:
    """As if a device were here."""
    loaded = vendor.load_emulator(Options(generation=generation.value))
    return replace(loaded, emulated=False)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other rank is asked."""
    monkeypatch.setattr(exchanges, "_every_rank", lambda request, own: own)


# How the library is told.


def august(x, topk_idx=None, quant_mode=None): ...


def september(x, topk_idx=None, use_fp8=False, use_mxfp4=False, use_mxfp8=False): ...


def before_july(x, topk_idx=None): ...


def low_latency_of_june(x, topk_idx, n, e, use_fp8=True, round_scale=False, use_ue8m0=False): ...


def low_latency_of_august(
    x, topk_idx, n, e, use_fp8=True, round_scale=False, use_ue8m0=False, use_mxfp4=False,
    quant_mode=None,
): ...  # fmt: skip


def low_latency_of_september(
    x, topk_idx, n, e, use_fp8=True, round_scale=False, use_ue8m0=False, use_mxfp4=False,
    use_mxfp8=False, quant_mode=None,
): ...  # fmt: skip


def low_latency_of_october(
    x, topk_idx, n, e, use_fp8=True, use_ue8m0=False, use_mxfp4=False, use_mxfp8=False
): ...


OFF = {"use_fp8": False, "use_ue8m0": False, "use_mxfp4": False}
NOT_FLOAT8 = {"use_ue8m0": False, "use_mxfp4": False, "round_scale": False}


@pytest.mark.parametrize(
    ("method", "mode", "dtype", "expected"),
    [
        (august, NORMAL, BF16, {"quant_mode": "bf16"}),
        (august, NORMAL, INT8, {"quant_mode": "int8"}),
        (september, NORMAL, INT8, {"use_fp8": True, "use_mxfp4": False, "use_mxfp8": False}),
        (low_latency_of_june, LOW_LATENCY, BF16,
         {"use_fp8": False, "use_ue8m0": False, "round_scale": False}),
        (low_latency_of_june, LOW_LATENCY, INT8,
         {"use_fp8": True, "use_ue8m0": False, "round_scale": False}),
        (low_latency_of_august, LOW_LATENCY, BF16,
         {"use_fp8": False, "quant_mode": None, **NOT_FLOAT8}),
        (low_latency_of_august, LOW_LATENCY, INT8,
         {"use_fp8": True, "quant_mode": "int8", **NOT_FLOAT8}),
        (low_latency_of_september, LOW_LATENCY, INT8,
         {"use_fp8": True, "quant_mode": "int8", "use_mxfp8": False, **NOT_FLOAT8}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("environment", [UNSET, FORCED])
def test_both_formats_are_said_whatever_the_variable_is(
    method: Any, mode: DispatchMode, dtype: DispatchDtype, expected: object, environment: Any
) -> None:
    found = format_arguments(method, mode, dtype, Generation.A3, environment)
    assert found == expected


@pytest.mark.parametrize(
    ("method", "mode"),
    [
        (september, NORMAL),
        (low_latency_of_september, LOW_LATENCY),
        (low_latency_of_october, LOW_LATENCY),
    ],
)
def test_bf16_that_only_flags_could_say_is_refused_where_the_variable_is_set(
    method: Any, mode: DispatchMode
) -> None:
    said = format_arguments(method, mode, BF16, Generation.A3, UNSET)
    assert not isinstance(said, Refusal)
    assert not any(said.values())
    found = format_arguments(method, mode, BF16, Generation.A3, FORCED)
    assert isinstance(found, Refusal)
    assert found.remedy == f"unset {INT8_DISPATCH} before the processes start"


def test_a_flag_that_means_float8_on_the_newest_chip_is_not_passed_for_int8() -> None:
    for method, mode in ((september, NORMAL), (low_latency_of_october, LOW_LATENCY)):
        found = format_arguments(method, mode, INT8, Generation.A5, UNSET)
        assert isinstance(found, Refusal)
        assert "sends float8 on A5" in found.reason


def test_a_library_that_asks_the_variable_alone_is_refused() -> None:
    found = format_arguments(before_july, NORMAL, INT8, Generation.A3, UNSET)
    assert isinstance(found, Refusal)
    assert "takes neither quant_mode nor use_fp8" in found.reason


# What the library carries.


@pytest.mark.parametrize(
    ("changes", "generation", "reason"),
    [
        ({"format": DispatchFormat(dtype=DispatchDtype.FP32)}, "A3", "it carries no fp32 rows"),
        ({"hidden_size": 4096}, "A2", "on A2 it takes hidden sizes of 7168"),
        ({"hidden_size": 512}, "A3", "on A3 it takes hidden sizes from 1024 to 7168"),
        ({"hidden_size": 100, "mode": LOW_LATENCY}, "A2", "hidden sizes from 32 to 7168"),
        ({"num_experts": 1024}, "A3", "it takes 512 experts"),
        ({"num_experts_per_tok": 17}, "A3", "it takes 16 experts of a token"),
        ({"max_tokens_per_rank": 513, "mode": LOW_LATENCY}, "A3", "takes 512 tokens of a rank"),
        ({"world_size": 6, "num_experts": 60}, "A3", "and there are 6"),
        ({"world_size": 16}, "A2", "between machines of A2 an environment variable alone"),
        ({"mode": LOW_LATENCY}, "A3", "needs a buffer of 264 MB, and HCCL_BUFFSIZE gives it 200"),
    ],
)
def test_what_it_does_not_carry(changes: dict[str, Any], generation: str, reason: str) -> None:
    device = silicon(Generation(generation))
    found = refusal(replace(REQUEST, **changes), device, UNSET)
    assert found is not None
    assert reason in found.reason
    assert found.expected is ("fp32" in reason)


@pytest.mark.parametrize(
    ("changes", "generation"),
    [
        ({}, "A2"),
        ({"hidden_size": 1024}, "A3"),
        ({"hidden_size": 64, "mode": LOW_LATENCY, "max_tokens_per_rank": 1}, "A2"),
        ({"world_size": 16}, "A3"),
        ({"world_size": 6, "num_experts": 12, "mode": LOW_LATENCY, "max_tokens_per_rank": 1}, "A3"),
    ],
)
def test_what_it_carries(changes: dict[str, Any], generation: str) -> None:
    assert refusal(replace(REQUEST, **changes), silicon(Generation(generation)), UNSET) is None


def test_the_core_sends_what_deep_ep_does_not_and_says_why_once_asked_for_nothing_else() -> None:
    small = replace(REQUEST, hidden_size=256)
    with pytest.warns(RuntimeWarning, match="takes hidden sizes from 1024"):
        made = Exchanges(silicon(), "auto", UNSET).create_token_dispatcher(small)
    assert made is NOT_SUPPORTED
    assert Exchanges(silicon(), "portable", UNSET).create_token_dispatcher(small) is NOT_SUPPORTED
    with pytest.raises(BackendUnusableError) as caught:
        Exchanges(silicon(), "deep_ep", UNSET).create_token_dispatcher(small)
    assert caught.value.reason is ReasonCode.REQUEST_UNSUPPORTED
    assert "layer model.layers.3.mlp: DeepEP does not carry its rows" in str(caught.value)


def test_float32_rows_are_left_to_the_core_without_a_word() -> None:
    plain = replace(REQUEST, format=DispatchFormat(dtype=DispatchDtype.FP32))
    assert Exchanges(silicon(), "auto", UNSET).create_token_dispatcher(plain) is NOT_SUPPORTED


def test_a_library_that_is_missing_is_named() -> None:
    with pytest.warns(RuntimeWarning, match="deep_ep is not installed .*sgl-kernel-npu"):
        made = Exchanges(silicon(), "auto", UNSET).create_token_dispatcher(REQUEST)
    assert made is NOT_SUPPORTED
    with pytest.raises(BackendUnusableError, match="deep_ep is not installed") as caught:
        Exchanges(silicon(), "deep_ep", UNSET).create_token_dispatcher(REQUEST)
    assert "build and install it" in (caught.value.remedy or "")


def test_a_library_that_cannot_be_imported_is_an_error_with_its_cause(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep_ep.py").write_text("raise OSError('libhccl.so: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BackendUnusableError, match=r"OSError: libhccl\.so: cannot open") as caught:
        Exchanges(silicon(), "auto", UNSET).create_token_dispatcher(REQUEST)
    assert caught.value.reason is ReasonCode.IMPORT_FAILED


def test_an_undecided_format_is_left_to_the_core() -> None:
    emulated = vendor.load_emulator(Options(generation="A3"))
    undecided = replace(REQUEST, format=None)
    with pytest.warns(RuntimeWarning, match="not decided yet"):
        made = Exchanges(emulated, "auto", UNSET).create_token_dispatcher(undecided)
    assert made is NOT_SUPPORTED


def test_the_variable_is_told_of_where_it_is_not_heard() -> None:
    emulated = vendor.load_emulator(Options(generation="A3"))
    for text in ("1", "0", "True"):
        environment = VendorEnvironment(int8_dispatch=text)
        with pytest.warns(RuntimeWarning, match=f"{INT8_DISPATCH} is set and is not heard"):
            Exchanges(emulated, "auto", environment).create_token_dispatcher(REQUEST)
    Exchanges(emulated, "auto", UNSET).create_token_dispatcher(REQUEST)


def test_layers_and_modes_share_one_connection() -> None:
    emulated = vendor.load_emulator(Options(generation="A3"))
    ours = Exchanges(emulated, "auto", UNSET)
    for mode in DispatchMode:
        ours.create_token_dispatcher(replace(REQUEST, mode=mode))
        ours.create_token_dispatcher(replace(REQUEST, mode=mode, layer="another"))
    assert len(ours._connections) == 1


# The environment and the buffer.


def test_variables_are_read_and_one_set_to_nothing_is_not_set() -> None:
    assert read_environment({}) == UNSET == read_environment({INT8_DISPATCH: " "})
    environment = read_environment(
        {
            INT8_DISPATCH: "True",
            "MOE_EXPERT_TOKEN_NUMS_TYPE": "0",
            "HCCL_INTRA_PCIE_ENABLE": "1",
            "HCCL_INTRA_ROCE_ENABLE": "0",
            "DEEP_USE_MODE": "ops",
            BUFFER: "512",
            "UNRELATED": "1",
        }
    )
    assert not environment.forces_int8, "only the text 1 does"
    assert environment.counts_are_ends
    assert environment.in_two_levels
    assert (environment.strategy, environment.buffer) == ("ops", "512")


def test_the_librarys_own_buffer_goes_before_that_of_hccl() -> None:
    assert configured_megabytes(UNSET) == (200, BUFFER)
    assert configured_megabytes(VendorEnvironment(buffer="300")) == (300, BUFFER)
    both = VendorEnvironment(buffer="300", own_buffer="900")
    assert configured_megabytes(both) == (900, OWN_BUFFER)
    with pytest.raises(ConfigError, match="HCCL_BUFFSIZE is '2GB'"):
        configured_megabytes(VendorEnvironment(buffer="2GB"))


SIZE = ExchangeSize(
    generation=Generation.A3,
    mode=NORMAL,
    max_tokens=4096,
    world_size=16,
    num_experts=256,
    num_experts_per_tok=8,
    hidden_size=7168,
)


@pytest.mark.parametrize(
    ("changes", "megabytes"),
    [
        # 4096 * 8 rows of 14848 and 14336 bytes, 106 MB beside them, all twice.
        ({}, 2 * (4096 * 8 * (14848 + 14336) / 2**20 + 106)),
        ({"generation": Generation.A5}, 2 * (4096 * 8 * (14848 + 14336) / 2**20 + 106) + 1),
        # 412 MB beside them twice, and 8 MB more.
        ({"generation": Generation.A2}, 2 * (4096 * 8 * (14848 + 14336) / 2**20 + 412) + 8),
        # 128 tokens: 16 ranks' for 16 experts each on their way, and 8 + 1 on the way back.
        (
            {"mode": LOW_LATENCY, "max_tokens": 128},
            2 * 128 * (16 * 16 * 14848 + 9 * 14336) / 2**20,
        ),
        (
            {"mode": LOW_LATENCY, "max_tokens": 128, "generation": Generation.A2},
            2 * (128 * 16 * 8 * 14336 / 2**20 + 2),
        ),
        (
            {
                "mode": LOW_LATENCY,
                "max_tokens": 128,
                "generation": Generation.A2,
                "in_two_levels": True,
            },
            256 * 128 * (14336 + 16 * 8) / 2**20 + 804,
        ),
    ],
)
def test_the_buffer_that_an_exchange_needs(changes: dict[str, Any], megabytes: float) -> None:
    needed = required_megabytes(replace(SIZE, **changes))
    assert megabytes <= needed < megabytes + 1


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(Generation),
    st.sampled_from(DispatchMode),
    st.integers(1, 512),
    st.sampled_from([2, 8, 16]),
    st.booleans(),
)
def test_more_tokens_and_wider_ones_never_need_less(
    generation: Generation, mode: DispatchMode, tokens: int, ranks: int, two_levels: bool
) -> None:
    size = replace(
        SIZE,
        generation=generation,
        mode=mode,
        max_tokens=tokens,
        world_size=ranks,
        in_two_levels=two_levels,
    )
    needed = required_megabytes(size)
    assert needed >= required_megabytes(replace(size, max_tokens=max(1, tokens // 2)))
    assert needed >= required_megabytes(replace(size, hidden_size=1024))
    if mode is NORMAL:
        assert needed > 200, "more than HCCL sets aside by itself"


# What the emulated library refuses.


def buffer(generation: Generation = Generation.A3, **options: Any) -> Any:
    chip = vendor.load_emulator(Options(generation=generation.value)).torch_npu.chip
    return EmulatedDeepEp(chip, options.pop("environment", UNSET)).Buffer(
        SimpleNamespace(rank=lambda: 0, size=lambda: 2), **options
    )


def call(of: Any, hidden: int = 1024, **changes: Any) -> object:
    rows = torch.zeros(2, hidden, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 1], [2, 3]])
    arguments: dict[str, Any] = {
        "num_tokens_per_rank": torch.zeros(2, dtype=torch.int32),
        "is_token_in_rank": torch.zeros(2, 2, dtype=torch.int32),
        "num_tokens_per_expert": torch.zeros(4, dtype=torch.int32),
        "topk_idx": ids,
        "topk_weights": torch.ones(2, 2),
    }
    return of.dispatch(rows, **{**arguments, **changes})


@pytest.mark.parametrize(
    ("generation", "changes", "error", "text"),
    [
        ("A3", {"quant_mode": "fp8"}, ValueError, "Invalid quant_mode: fp8"),
        ("A3", {"quant_mode": "mx_fp8_e4m3"}, RuntimeError, "please use int8 or bf16 instead"),
        ("A5", {"quant_mode": "mx_fp8_e4m3"}, NotImplementedError, "is not emulated"),
        ("A3", {"hidden": 512}, RuntimeError, r"dims1\(H\) should be in \[1024, 7168\]"),
        ("A2", {"hidden": 1024}, RuntimeError, r"dims1\(H\) should be in \[7168, 7168\]"),
        ("A3", {"topk_weights": torch.ones(2, 2).double()}, RuntimeError, "at::kFloat"),
        ("A3", {"handle": ()}, NotImplementedError, "handle is not supported yet"),
    ],
)
def test_the_emulated_dispatch_refuses(
    generation: str, changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call(buffer(Generation(generation)), **{"quant_mode": "bf16", **changes})


@pytest.mark.parametrize(
    ("ids", "changes", "error", "text"),
    [
        ([[0, -1]], {}, RuntimeError, "MOE_ENABLE_TOPK_NEG_ONE"),
        ([[1, 1]], {}, RuntimeError, "names twice"),
        ([[0, 1]] * 5, {}, RuntimeError, "num_max_dispatch_tokens_per_rank >= x.size"),
        ([[0, 1]], {"quant_mode": "bf16"}, ValueError, "Unsupported quant_mode: bf16"),
        ([[0, 1]], {"quant_mode": None, "use_mxfp4": True}, RuntimeError, "mx_fp4_e2m1 is not"),
        ([[0, 1]], {"use_fp8": True, "use_ue8m0": True}, RuntimeError, "mx_fp8_e4m3 is not"),
    ],
)
def test_the_emulated_low_latency_dispatch_refuses(
    ids: list[list[int]], changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    rows = torch.zeros(len(ids), 1024, dtype=torch.bfloat16)
    arguments = {"use_fp8": False, **changes}
    with pytest.raises(error, match=text):
        buffer(low_latency_mode=True).low_latency_dispatch(
            rows, torch.tensor(ids), 4, 4, **arguments
        )


def test_a_buffer_is_made_for_low_latency_exchanges_or_not() -> None:
    rows = torch.zeros(1, 1024, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="low_latency_mode"):
        buffer().low_latency_dispatch(rows, torch.tensor([[0, 1]]), 4, 4)
    with pytest.raises(RuntimeError, match="must not exceed the configured capacity"):
        buffer().get_dispatch_layout(torch.zeros(8193, 2, dtype=torch.int64), 4)
    with pytest.raises(NotImplementedError, match="'alltoall' is not emulated"):
        buffer(environment=VendorEnvironment(strategy="alltoall"))


def test_the_emulated_methods_are_called_as_those_of_the_library() -> None:
    """The names and order of sgl-kernel-npu's own, which calls by name depend on."""
    chip = vendor.load_emulator(Options()).torch_npu.chip
    library = EmulatedDeepEp(chip).Buffer
    normal = list(inspect.signature(library.dispatch).parameters)
    assert normal[1:3] == ["x", "handle"]
    assert normal[-1] == "quant_mode"
    assert {"topk_idx", "topk_weights", "num_tokens_per_rdma_rank"} < set(normal)
    fast = list(inspect.signature(library.low_latency_dispatch).parameters)
    assert fast[1:5] == ["x", "topk_idx", "num_max_dispatch_tokens_per_rank", "num_experts"]
    assert fast[-1] == "quant_mode"
    assert exchange_library.MOST_TOKENS == 8192
