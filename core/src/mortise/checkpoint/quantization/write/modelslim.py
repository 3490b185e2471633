"""Writing int8 and int4 as ModelSlim stores them, beside a description of every tensor."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise.checkpoint.directory import CONFIG_FILE
from mortise.errors import QuantizationConfigError
from mortise.formats.integer import pack_int4_bytes, unpack_int4
from mortise.spec.weights import StoredWeight, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mortise.checkpoint.quantization.module_scheme import ModuleScheme
    from mortise.checkpoint.quantization.write.dialect import QuantisedModule, WrittenModel

DESCRIPTION_FILE: Final = "quant_model_description.json"
VERSION: Final = "1.0.0"
FLOAT: Final = "FLOAT"
STATIC: Final = "W8A8"

TYPES: Final[Mapping[WeightScheme, str]] = MappingProxyType(
    {
        WeightScheme.W8A8: "W8A8_DYNAMIC",
        WeightScheme.W4A8: "W4A8_DYNAMIC",
        WeightScheme.W4A4: "W4A4_DYNAMIC",
    }
)

MODEL_TYPES: Final = (FLOAT, "W8A8_DYNAMIC", STATIC, "W4A4_DYNAMIC")
"""Types that name a whole model, the strongest last; W4A8_DYNAMIC never does."""

SUMMED_APART: Final = ("down_proj", "o_proj")
"""Projections whose columns may be divided among 16 ranks, each of which needs its own sum."""

NUM_SUMS: Final = 16


@dataclass(frozen=True, slots=True)
class ModelSlimWriter:
    """Types are the description's; ``config.json`` says nothing."""

    stem: str = "quant_model_weights"

    def tensors(self, quantised: QuantisedModule) -> Mapping[str, torch.Tensor]:
        """See :class:`~mortise.checkpoint.quantization.write.dialect.DialectWriter`."""
        stored = quantised.stored
        if stored.input_scale is not None:
            return static_tensors(quantised)
        assert stored.scale is not None
        scales = {"weight_scale": stored.scale, "weight_offset": torch.zeros_like(stored.scale)}
        match stored.scheme:
            case WeightScheme.W4A8:
                values = unpack_int4(stored.weight)
                sums = scale_bias(quantised.module, values, stored.scale)
                return {"weight": pack_int4_bytes(values, -2), **scales, "scale_bias": sums}
            case WeightScheme.W4A4:
                return {"weight": unpack_int4(stored.weight), **scales}
            case _:
                return {"weight": stored.weight, **scales}

    def files(self, written: WrittenModel) -> Mapping[str, Mapping[str, Any]]:
        """See :class:`~mortise.checkpoint.quantization.write.dialect.DialectWriter`."""
        types = {
            name: FLOAT if projection is None else type_of(projection.scheme)
            for name, projection in written.tensors.items()
        }
        group_sizes = [
            one.scheme.group_size for one in written.projections if one.scheme.group_size
        ]
        description = {
            **types,
            "version": VERSION,
            "model_quant_type": model_type(types.values()),
            "metadata": {},
            "group_size": group_sizes[0] if group_sizes else 0,
            "optional": {},
        }
        return {CONFIG_FILE: written.config, DESCRIPTION_FILE: description}


def type_of(scheme: ModuleScheme) -> str:
    """The description's word for a scheme."""
    return STATIC if scheme.static_input else TYPES[scheme.scheme]


def model_type(types: Iterable[str]) -> str:
    """The strongest of the types that may name a model."""
    return max(set(types) & set(MODEL_TYPES), key=MODEL_TYPES.index, default=FLOAT)


def scale_bias(module: str, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What a product of int8 with int4 adds, having shifted the int4 to be positive.

    Eight times the sum over K of the weight: float32 ``[N, 1]``, or ``[N, 16]`` for projections
    whose columns may be divided (``msmodelslim``, ``save/utils/pack.py``, ``process_scale``).

    Args:
        module: dotted name, which decides.
        values: int8 ``[N, K]`` in -8..7.
        scale: float32 ``[N, 1]``.
    """
    rows, columns = values.shape
    apart = module.endswith(SUMMED_APART) and columns % NUM_SUMS == 0
    weight = values.float() * scale
    return 8 * weight.reshape(rows, NUM_SUMS if apart else 1, -1).sum(dim=-1)


def static_tensors(quantised: QuantisedModule) -> dict[str, torch.Tensor]:
    """Int8 whose input is quantised by a scale and an offset fixed beforehand.

    The accumulated product is to be corrected by ``quant_bias`` and multiplied by ``deq_scale``;
    models in another type than bfloat16 hold the bits of the latter in an int64
    (``msmodelslim``, ``save/ascendv1.py``, ``on_w8a8_static``).

    Raises:
        QuantizationConfigError: the correction exceeds an int32.
    """
    stored: StoredWeight = quantised.stored
    assert stored.scale is not None
    assert stored.input_scale is not None and stored.input_offset is not None
    factor = (stored.input_scale * stored.scale.squeeze(1)).float()
    bias = torch.zeros_like(factor) if quantised.bias is None else quantised.bias.float()
    correction = (bias / factor - stored.weight.float().sum(dim=1) * stored.input_offset).round()
    if bool((correction.abs() > torch.iinfo(torch.int32).max).any()):
        raise QuantizationConfigError(
            f"module {quantised.module}: its bias is too large for an int32 beside its scales",
            expected="a bias of the magnitude of the products",
            remedy=f"quantise it dynamically: --scheme-for {quantised.module}=w8a8",
        )
    is_bfloat16 = quantised.float_dtype is torch.bfloat16
    bits = factor if is_bfloat16 else factor.view(torch.int32).to(torch.int64)
    return {
        "weight": stored.weight,
        "quant_bias": correction.to(torch.int32),
        "input_scale": stored.input_scale,
        "input_offset": stored.input_offset,
        "deq_scale": bits,
    }
