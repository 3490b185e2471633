"""FlashInfer's adapter over its emulation, beside the backend's own programs; and how it fails."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from plugins.cuda_blackwell.tests.nvfp4_cases import normal, stored_weight
from plugins.cuda_common.tests.expert_cases import defined, masked, random_rows, runtime_of
from tests.fixtures.scheme_storages import Storage, random_weight

from mortise.errors import BackendUnusableError
from mortise.formats.nvfp4 import dequantise_nvfp4, quantise_nvfp4
from mortise.plugin import (
    DispatchDtype,
    DispatchFormat,
    DispatchMode,
    DoctorRequest,
    ExpertWeights,
    RowLayout,
    ScaleFormat,
    ScaleLayout,
    StoredWeight,
    Verdict,
    WeightScheme,
)
from mortise.testing.poison import with_poison
from mortise_cuda_blackwell.emulator.flashinfer import EmulatedFlashInfer
from mortise_cuda_blackwell.layout import Nvfp4Weight
from mortise_cuda_blackwell.libraries import flashinfer
from mortise_cuda_blackwell.libraries.flashinfer import FlashInfer
from mortise_cuda_blackwell.loading import library_findings
from mortise_cuda_blackwell.options import Options
from mortise_cuda_blackwell.products.nvfp4 import Nvfp4Product
from mortise_cuda_blackwell.products.nvfp4_flashinfer import Nvfp4FlashInferProduct
from mortise_cuda_blackwell.scales import from_tiles, to_tiles
from mortise_cuda_blackwell.select import BlackwellProducts
from mortise_cuda_common.chip import Architecture
from mortise_cuda_common.moe import quantized_moe_apply

if TYPE_CHECKING:
    from mortise.plugin import DispatchedTokens

CPU, BF16 = torch.device("cpu"), torch.bfloat16
LIBRARY = FlashInfer.emulated()
RUNTIME = runtime_of(Architecture.SM100, deep_gemm=False)
TRITON = BlackwellProducts(RUNTIME)
PRODUCTS = BlackwellProducts(RUNTIME, flash_infer=LIBRARY)
HIDDEN, INTERMEDIATE = 256, 128
COUNTS = [5, 0, 3]


def one_scale(stored: StoredWeight) -> StoredWeight:
    """Gate and up under the same global scale, as FlashInfer wants them."""
    assert stored.global_scale is not None
    return replace(stored, global_scale=stored.global_scale[:, :1].repeat(1, stored.num_parts))


def experts_of(*, shared_scale: bool = True) -> ExpertWeights:
    form, leading = Storage(WeightScheme.NVFP4, static_input=True), (len(COUNTS),)
    w13 = random_weight(form, 2 * INTERMEDIATE, HIDDEN, num_parts=2, leading=leading, seed=1)
    return ExpertWeights(
        layer="model.layers.3.mlp",
        w13=one_scale(w13) if shared_scale else w13,
        w2=random_weight(form, HIDDEN, INTERMEDIATE, leading=leading, seed=2),
        num_local_experts=len(COUNTS),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
    )


def as_nvfp4(tokens: DispatchedTokens) -> DispatchedTokens:
    rows, scales = quantise_nvfp4(tokens.rows, 2e-3)
    stated = DispatchFormat(
        dtype=DispatchDtype.NVFP4,
        scale_layout=ScaleLayout.PER_BLOCK_16,
        scale_format=ScaleFormat.E4M3,
        global_scale=2e-3,
        row_layout=RowLayout.MASKED,
        mode=DispatchMode.LOW_LATENCY,
    )
    return replace(tokens, rows=rows, scales=scales, format=stated)


def applied(
    products: BlackwellProducts, tokens: DispatchedTokens, experts: ExpertWeights
) -> torch.Tensor:
    def apply(
        tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
    ) -> torch.Tensor:
        return quantized_moe_apply(products, tokens, experts, out_dtype)

    return defined(with_poison(apply)(tokens, experts, BF16), tokens)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("capacity", [8, 130])
def test_experts_give_what_the_own_programs_give(quantised: bool, capacity: int) -> None:
    tokens = masked(random_rows(COUNTS, HIDDEN), capacity)
    tokens = as_nvfp4(tokens) if quantised else tokens
    experts = experts_of()
    assert isinstance(PRODUCTS.of(experts.w13), Nvfp4FlashInferProduct)
    found, wanted = (applied(one, tokens, experts) for one in (PRODUCTS, TRITON))
    # Its SwiGLU rounds to bfloat16 once, and ours twice: see test_cuda_blackwell_experts.
    assert float((found.double() - wanted.double()).norm() / wanted.double().norm()) < 6e-2


def test_rows_in_no_slots_are_left_to_the_own_programs() -> None:
    tokens = masked(random_rows(COUNTS, HIDDEN), 8)
    flat = replace(
        tokens,
        rows=torch.cat([rows[:count] for rows, count in zip(tokens.rows, COUNTS, strict=True)]),
        format=replace(tokens.format, row_layout=RowLayout.GROUPED, mode=DispatchMode.NORMAL),
    )
    experts = experts_of()
    found, wanted = (applied(one, flat, experts) for one in (PRODUCTS, TRITON))
    assert torch.equal(found, wanted)


def test_gate_and_up_of_different_scales_are_multiplied_by_triton_and_told() -> None:
    experts = experts_of(shared_scale=False)
    with pytest.warns(RuntimeWarning, match="gate and up have different global scales"):
        w13 = PRODUCTS.of(experts.w13)
    assert type(w13) is Nvfp4Product
    assert isinstance(w2 := PRODUCTS.of(experts.w2), Nvfp4FlashInferProduct)
    prepared = replace(experts)
    tokens = masked(random_rows(COUNTS, HIDDEN), 8)
    with pytest.warns(RuntimeWarning, match="own Triton programs do"):
        found = applied(PRODUCTS, tokens, prepared)
    wanted = applied(TRITON, tokens, experts)
    # Rows between the two come from one program and are the same; only sums may be ordered anew.
    torch.testing.assert_close(found, wanted, rtol=2.0**-7, atol=1e-3)
    assert w2.library is LIBRARY


@pytest.mark.parametrize(
    ("experts", "rows", "columns", "problem"),
    [
        (1, 128, 64, "2 local experts or more"),
        (2, 128, 80, "80 columns are no multiple of 64"),
        (2, 192, 64, "192 rows are no multiple of 128"),
        (2, 256, 128, ""),
    ],
)
def test_what_it_takes(experts: int, rows: int, columns: int, problem: str) -> None:
    found = FlashInfer.problem(Nvfp4Weight.of(stored_weight(0, experts, rows, columns)))
    assert problem in found
    assert bool(found) is bool(problem)


def test_a_projection_is_one_expert_and_stays_with_triton() -> None:
    stored = random_weight(Storage(WeightScheme.NVFP4, static_input=True), 128, 64)
    assert type(PRODUCTS.of(stored)) is Nvfp4Product


# The adapter and the emulation.


def test_quantisers_give_the_rows_of_the_format() -> None:
    plain = normal(3, 2, 130, 80, dtype=BF16)
    counts, scales = torch.tensor([130, 3], dtype=torch.int32), torch.tensor([1e-3, 2e-2])
    values, tiles = LIBRARY.quantise(plain, scales.reciprocal(), counts)
    rows = from_tiles(tiles, 130, 5)
    for expert, count in enumerate(counts.tolist()):
        packed, wanted = quantise_nvfp4(plain[expert, :count], scales[expert])
        assert torch.equal(values[expert, :count], packed)
        assert torch.equal(rows[expert, :count].float(), wanted.float())
        assert rows[expert, count:].float().isnan().all(), "nobody wrote them"


def test_swiglu_takes_gate_first() -> None:
    gate_up = normal(4, 2, 4, 64, dtype=BF16)
    counts, ones = torch.tensor([4, 4], dtype=torch.int32), torch.full((2,), 100.0)
    values, tiles = LIBRARY.swiglu_quantise(gate_up, ones, counts)
    gate, up = gate_up.float().chunk(2, dim=2)
    wanted, _ = quantise_nvfp4((gate * gate.sigmoid() * up).to(BF16), 1 / 100.0)
    assert float((values != wanted).float().mean()) < 0.01
    assert tiles.shape == (32, 4, 1, 4, 1, 2)


@pytest.mark.parametrize("out_dtype", [BF16, torch.float32])
def test_the_product_leaves_other_rows_alone(out_dtype: torch.dtype) -> None:
    stored = stored_weight(5, 2, 128, 64)
    assert stored.scale is not None
    values, scales = quantise_nvfp4(normal(6, 2, 40, 64), 1e-2)
    counts, alphas = torch.tensor([40, 7], dtype=torch.int32), torch.tensor([1e-2, 3e-2])
    out = torch.full((2, 40, 128), 13.0, dtype=out_dtype)
    EmulatedFlashInfer().gemm.grouped_gemm_nt_masked(
        (values.permute(1, 2, 0), to_tiles(scales)),
        (stored.weight.permute(1, 2, 0), to_tiles(stored.scale)),
        out.permute(1, 2, 0),
        counts,
        ab_dtype="float4_e2m1fn",
        sf_dtype="float8_e4m3fn",
        c_dtype=str(out_dtype).removeprefix("torch."),
        sf_vec_size=16,
        alpha=alphas,
        alpha_dtype="float32",
    )
    for expert, count in enumerate(counts.tolist()):
        left = dequantise_nvfp4(values[expert, :count], scales[expert, :count], 1.0).double()
        right = dequantise_nvfp4(stored.weight[expert], stored.scale[expert], 1.0).double()
        wanted = left @ right.T * alphas[expert].double()
        torch.testing.assert_close(out[expert, :count].double(), wanted, rtol=2.0**-8, atol=1e-4)
        assert (out[expert, count:] == 13.0).all()


def operands(experts: int = 2, columns: int = 64) -> dict[str, Any]:
    values, scales = quantise_nvfp4(normal(6, experts, 128, columns), 1e-2)
    return {
        "lhs": (values.permute(1, 2, 0), to_tiles(scales)),
        "rhs": (values.permute(1, 2, 0), to_tiles(scales)),
        "out": torch.zeros(experts, 128, 128, dtype=BF16).permute(1, 2, 0),
        "masked_m": torch.ones(experts, dtype=torch.int32),
        "ab_dtype": "float4_e2m1fn",
        "sf_dtype": "float8_e4m3fn",
        "c_dtype": "bfloat16",
        "sf_vec_size": 16,
    }


def test_the_emulation_refuses_what_the_library_refuses_or_does_wrongly() -> None:
    product = EmulatedFlashInfer().gemm.grouped_gemm_nt_masked
    product(**operands())
    with pytest.raises(ValueError, match="contiguous in the layout implied by c_major"):
        product(**operands() | {"out": torch.zeros(128, 128, 2, dtype=BF16)})
    with pytest.raises(RuntimeError, match="issue when l=1"):
        product(**operands(experts=1))
    with pytest.raises(AssertionError, match="Unsupported kwargs"):
        product(**operands(), alhpa=None)
    with pytest.raises(RuntimeError, match="columns that are not there"):
        product(**operands(columns=96))
    with pytest.raises(NotImplementedError, match="dtypes fp16/bf16"):
        EmulatedFlashInfer().scaled_fp4_grouped_quantize(
            torch.zeros(1, 1, 16), torch.ones(1, dtype=torch.int32), torch.ones(1)
        )


# How it fails: one clear row, cause first and remedy last.


def test_it_is_not_installed() -> None:
    if flashinfer.importlib.util.find_spec("flashinfer") is not None:
        pytest.skip("FlashInfer is installed here")
    with pytest.raises(BackendUnusableError, match="flashinfer is not installed") as caught:
        FlashInfer.load(CPU)
    assert 'set option nvfp4 to "triton"' in (caught.value.remedy or "")
    request = DoctorRequest(device=None)
    (finding,) = library_findings(request, Options(nvfp4="flashinfer"))
    assert (finding.verdict, finding.found) == (Verdict.FAIL, "flashinfer is not installed")


def test_a_version_without_the_product() -> None:
    with pytest.raises(BackendUnusableError, match=r"flashinfer 0\.5\.0 has no gemm\.grouped") as e:
        FlashInfer.of(SimpleNamespace(__version__="0.5.0"), CPU)
    assert "nvidia-cutlass-dsl" in e.value.details[0]


def test_a_product_that_is_wrong_or_fails() -> None:
    def library(product: Any) -> SimpleNamespace:
        whole = EmulatedFlashInfer()
        return SimpleNamespace(
            __version__="0.6.18",
            gemm=SimpleNamespace(grouped_gemm_nt_masked=product),
            scaled_fp4_grouped_quantize=whole.scaled_fp4_grouped_quantize,
            silu_and_mul_scaled_nvfp4_experts_quantize=(
                whole.silu_and_mul_scaled_nvfp4_experts_quantize
            ),
        )

    right = EmulatedFlashInfer().gemm.grouped_gemm_nt_masked

    def without_alpha(*args: Any, alpha: Any, **kwargs: Any) -> None:
        right(*args, **kwargs)

    def failing(*args: Any, **kwargs: Any) -> None:
        raise OSError("libcutlass.so: cannot open shared object file")

    FlashInfer.of(library(right), CPU)
    with pytest.raises(BackendUnusableError, match="multiplies NVFP4 wrongly here"):
        FlashInfer.of(library(without_alpha), CPU)
    with pytest.raises(BackendUnusableError, match="OSError: libcutlass") as caught:
        FlashInfer.of(library(failing), CPU)
    assert caught.value.details == ("while it multiplied for the first time",)
