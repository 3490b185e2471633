"""The one place that imports FlashInfer: its products of NVFP4 rows in slots of equal capacity."""

# Signatures and layouts are those of flashinfer-ai/flashinfer at fb28d72 (0.6.18, August 2026):
# gemm/kernels/grouped_gemm_masked_wrapper.py, quantization/fp4_quantization.py, activation.py.

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise.formats.nvfp4 import BLOCK, dequantise_nvfp4, quantise_nvfp4
from mortise.plugin import BackendUnusableError, ReasonCode
from mortise_cuda_blackwell.emulator.flashinfer import EmulatedFlashInfer
from mortise_cuda_blackwell.scales import to_tiles

if TYPE_CHECKING:
    from collections.abc import Callable

    from mortise_cuda_blackwell.layout import Nvfp4Weight

MODULE: Final = "flashinfer"
PIP: Final = 'pip install "flashinfer-python>=0.6.18" nvidia-cutlass-dsl'
INSTEAD: Final = 'or set option nvfp4 to "triton", which needs no FlashInfer'

COLUMN_MULTIPLE: Final = 64
"""Columns of a product: four block scales make a tile, and nobody writes those of a partial one."""
ROW_MULTIPLE: Final = 128
"""Rows of each part of a weight: as many scales make a tile."""
FEWEST_EXPERTS: Final = 2
"""The product of a single one is known to be wrong (the library's own test expects that)."""

_FORMATS: Final = MappingProxyType({torch.bfloat16: "bfloat16", torch.float32: "float32"})
_MOST_DIFFERENCE: Final = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashInfer:
    """FlashInfer's masked products on one chip.

    Shapes: E experts, C rows of a slot, N outputs, K columns. ``tiles`` are e4m3 scales as
    :func:`mortise_cuda_blackwell.scales.to_tiles` arranges them.

    Args:
        version: of the library.
        functions: what is called: ``product``, ``quantise``, ``swiglu_quantise``.
        is_emulated: whether it is the emulation.
    """

    version: str
    functions: MappingProxyType[str, Callable[..., Any]]
    is_emulated: bool = False

    @classmethod
    def load(cls, device: torch.device) -> FlashInfer:
        """Import the library and multiply by it once, before anything relies on it.

        Raises:
            BackendUnusableError: it is missing, lacks what is called, or multiplies wrongly; root
                cause first.
        """
        return cls.of(import_library(), device)

    @classmethod
    def of(cls, library: Any, device: torch.device) -> FlashInfer:
        """Use a library that is imported already.

        Raises:
            BackendUnusableError: it lacks a function or multiplies wrongly.
        """
        found = cls(
            version=str(getattr(library, "__version__", "unknown")), functions=_functions(library)
        )
        found.require_right_product(device)
        return found

    @classmethod
    def emulated(cls) -> FlashInfer:
        """The same functions on a CPU."""
        library = EmulatedFlashInfer()
        return cls(version=library.__version__, functions=_functions(library), is_emulated=True)

    @staticmethod
    def problem(weight: Nvfp4Weight) -> str:
        """Why the library does not multiply by a weight, or nothing. Waits for the device."""
        if weight.num_experts < FEWEST_EXPERTS:
            return f"it multiplies {FEWEST_EXPERTS} local experts or more"
        if weight.columns % COLUMN_MULTIPLE:
            return f"{weight.columns} columns are no multiple of {COLUMN_MULTIPLE}"
        if weight.part_rows % ROW_MULTIPLE:
            return f"{weight.part_rows} rows are no multiple of {ROW_MULTIPLE}"
        if not torch.equal(
            weight.global_scale, weight.global_scale[:, :1].expand_as(weight.global_scale)
        ):
            return "gate and up have different global scales, and it takes one for both"
        return ""

    def quantise(
        self, plain_ECK: torch.Tensor, divisors_E: torch.Tensor, counts_E: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantise the valid rows of each slot.

        Args:
            plain_ECK: bfloat16.
            divisors_E: float32, the reciprocal of each expert's global scale.
            counts_E: int32, valid rows.

        Returns:
            uint8 ``[E, C, K/2]`` and tiles.
        """
        packed, tiles = self.functions["quantise"](plain_ECK, counts_E, divisors_E)
        return packed.permute(2, 0, 1), tiles

    def swiglu_quantise(
        self, gate_up_EC2I: torch.Tensor, divisors_E: torch.Tensor, counts_E: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantise silu(gate) * up, rounded once to bfloat16, of the valid rows of each slot.

        Returns:
            uint8 ``[E, C, I/2]`` and tiles.
        """
        packed, tiles = self.functions["swiglu_quantise"](gate_up_EC2I, counts_E, divisors_E)
        return packed.permute(2, 0, 1), tiles

    def multiply(
        self,
        rows: tuple[torch.Tensor, torch.Tensor],
        weight: tuple[torch.Tensor, torch.Tensor],
        alphas_E: torch.Tensor,
        counts_E: torch.Tensor,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Multiply the valid rows of each slot by the weight of its expert.

        Args:
            rows: uint8 ``[E, C, K/2]`` and their tiles.
            weight: uint8 ``[E, N, K/2]`` and its tiles.
            alphas_E: float32, factors of the sums.
            counts_E: int32, valid rows.
            out_dtype: bfloat16 or float32.

        Returns:
            ``[E, C, N]``; other rows are undefined.
        """
        (values_ECK, row_tiles), (weight_ENK, weight_tiles) = rows, weight
        out = values_ECK.new_empty((*values_ECK.shape[:2], weight_ENK.shape[1]), dtype=out_dtype)
        self.functions["product"](
            (values_ECK.permute(1, 2, 0), row_tiles),
            (weight_ENK.permute(1, 2, 0), weight_tiles),
            out.permute(1, 2, 0),
            counts_E,
            ab_dtype="float4_e2m1fn",
            sf_dtype="float8_e4m3fn",
            c_dtype=_FORMATS[out_dtype],
            sf_vec_size=BLOCK,
            alpha=alphas_E,
            alpha_dtype="float32",
        )
        return out

    def require_right_product(self, device: torch.device) -> None:
        """Multiply two experts' rows once, beside torch's product of the same numbers.

        Raises:
            BackendUnusableError: it failed, or computed something else.
        """
        generator = torch.Generator().manual_seed(0)
        rows, weight = (
            torch.randn(FEWEST_EXPERTS, ROW_MULTIPLE, 256, generator=generator) for _ in range(2)
        )
        operands = [quantise_nvfp4(one, 2e-3) for one in (rows, weight)]
        exact = [dequantise_nvfp4(packed, scale, 2e-3) for packed, scale in operands]
        placed = [(packed.to(device), to_tiles(scale.to(device))) for packed, scale in operands]
        counts = torch.tensor([ROW_MULTIPLE, 70], dtype=torch.int32)
        alphas = torch.full((FEWEST_EXPERTS,), 2e-3 * 2e-3, device=device)
        try:
            found = self.multiply(
                placed[0], placed[1], alphas, counts.to(device), torch.bfloat16
            ).cpu()
        except Exception as error:
            raise _failure(error, "while it multiplied for the first time") from error
        for expert, count in enumerate(counts.tolist()):
            wanted = exact[0][expert, :count] @ exact[1][expert].T
            difference = float((found[expert, :count].float() - wanted).norm() / wanted.norm())
            if not difference < _MOST_DIFFERENCE:  # NaN as well
                raise BackendUnusableError(
                    f"{MODULE} {self.version} multiplies NVFP4 wrongly here: it differs by"
                    f" {difference:.3g} from torch",
                    reason=ReasonCode.CREATE_FAILED,
                    expected=f"less than {_MOST_DIFFERENCE}",
                    remedy=f"{PIP}, {INSTEAD}",
                )


def import_library() -> Any:
    """Import ``flashinfer``.

    Raises:
        BackendUnusableError: it cannot be imported, root cause first.
    """
    if importlib.util.find_spec(MODULE) is None:
        raise BackendUnusableError(
            f"{MODULE} is not installed",
            reason=ReasonCode.IMPORT_FAILED,
            remedy=f"{PIP}, {INSTEAD}",
        )
    try:
        return importlib.import_module(MODULE)
    except Exception as error:
        raise _failure(error, f"while importing {MODULE}") from error


def installed() -> str:
    """The version that is installed, without importing it.

    Raises:
        BackendUnusableError: none is.
    """
    for name in ("flashinfer-python", MODULE):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise BackendUnusableError(
        f"{MODULE} is not installed",
        reason=ReasonCode.IMPORT_FAILED,
        remedy=f"{PIP}, {INSTEAD}",
    )


def _functions(library: Any) -> MappingProxyType[str, Callable[..., Any]]:
    """What is called, by this adapter's names, wherever this version keeps it."""
    names = {
        "product": ("gemm.grouped_gemm_nt_masked", "cute_dsl.grouped_gemm_nt_masked"),
        "quantise": ("scaled_fp4_grouped_quantize",),
        "swiglu_quantise": ("silu_and_mul_scaled_nvfp4_experts_quantize",),
    }
    return MappingProxyType({own: _found(library, theirs) for own, theirs in names.items()})


def _found(library: Any, names: tuple[str, ...]) -> Callable[..., Any]:
    for name in names:
        found = library
        for part in name.split("."):
            found = getattr(found, part, None)
        if callable(found):
            function: Callable[..., Any] = found
            return function
    version = getattr(library, "__version__", "unknown")
    raise BackendUnusableError(
        f"{MODULE} {version} has no {names[0]}",
        reason=ReasonCode.IMPORT_FAILED,
        details=["it leaves the product out where nvidia-cutlass-dsl is not installed"],
        remedy=f"{PIP}, {INSTEAD}",
    )


def _failure(error: BaseException, when: str) -> BackendUnusableError:
    """The root cause first."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return BackendUnusableError(
        f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": "),
        reason=ReasonCode.IMPORT_FAILED,
        details=[when],
        remedy=f"{PIP}, {INSTEAD}",
    )
