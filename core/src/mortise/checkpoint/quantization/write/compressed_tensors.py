"""Writing int8, packed int4 and packed float4 as the compressed-tensors library stores them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch

from mortise.checkpoint.directory import CONFIG_FILE
from mortise.checkpoint.quantization.write.covering import by_regular_expression, covering
from mortise.checkpoint.save import STEM
from mortise.formats.integer import to_offset_binary
from mortise.formats.nvfp4 import BLOCK, multiplier_from_divisor
from mortise.spec.weights import WeightScheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mortise.checkpoint.quantization.module_scheme import ModuleScheme
    from mortise.checkpoint.quantization.write.dialect import QuantisedModule, WrittenModel
    from mortise.checkpoint.quantization.write.projections import Projection
    from mortise.spec.weights import StoredWeight

FORMATS: Final[Mapping[WeightScheme, str]] = MappingProxyType(
    {
        WeightScheme.W8A8: "int-quantized",
        WeightScheme.W4A8: "pack-quantized",
        WeightScheme.W4A16: "pack-quantized",
        WeightScheme.NVFP4: "nvfp4-pack-quantized",
    }
)
MIXED: Final = "mixed-precision"
EVERY_LINEAR: Final = "Linear"
SCALE_DTYPE: Final = "torch.float8_e4m3fn"


@dataclass(frozen=True, slots=True)
class CompressedTensorsWriter:
    """Each scheme is a group of the configuration that names its modules."""

    stem: str = STEM

    def tensors(self, quantised: QuantisedModule) -> Mapping[str, torch.Tensor]:
        """See :class:`~mortise.checkpoint.quantization.write.dialect.DialectWriter`."""
        stored = quantised.stored
        assert stored.scale is not None
        match stored.scheme:
            case WeightScheme.W8A8:
                return {"weight": stored.weight, "weight_scale": stored.scale}
            case WeightScheme.NVFP4:
                return nvfp4_tensors(stored)
            case _:
                rows, words = stored.weight.shape
                return {
                    "weight_packed": to_offset_binary(stored.weight),
                    "weight_scale": stored.scale,
                    "weight_shape": torch.tensor([rows, words * 8]),
                }

    def files(self, written: WrittenModel) -> Mapping[str, Mapping[str, Any]]:
        """See :class:`~mortise.checkpoint.quantization.write.dialect.DialectWriter`."""
        groups = grouped(written.projections)
        formats = sorted({FORMATS[scheme] for scheme, _ in groups})
        section = {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": formats[0] if len(formats) == 1 else MIXED,
            "config_groups": {
                f"group_{number}": {
                    "targets": targets(modules, written.projections, alone=len(groups) == 1),
                    "weights": weights(*form),
                    "input_activations": input_activations(form[0]),
                    "output_activations": None,
                    "format": FORMATS[form[0]],
                }
                for number, (form, modules) in enumerate(groups.items())
            },
            "ignore": ignored(written.projections),
            "kv_cache_scheme": None,
        }
        return {CONFIG_FILE: {**written.config, "quantization_config": section}}


def nvfp4_tensors(stored: StoredWeight) -> dict[str, torch.Tensor]:
    """Packed values, scales of blocks, and the divisors common to all of them."""
    assert stored.scale is not None
    assert stored.global_scale is not None and stored.input_scale is not None
    return {
        "weight_packed": stored.weight,
        "weight_scale": stored.scale,
        # One over a factor is its divisor, as one over a divisor is its factor.
        "weight_global_scale": multiplier_from_divisor(stored.global_scale),
        "input_global_scale": multiplier_from_divisor(stored.input_scale),
    }


def grouped(
    projections: Sequence[Projection],
) -> dict[tuple[WeightScheme, int | None], list[str]]:
    """The quantised modules by scheme and group size."""
    groups: dict[tuple[WeightScheme, int | None], list[str]] = defaultdict(list)
    for projection in projections:
        if projection.is_quantised:
            scheme: ModuleScheme = projection.scheme
            groups[scheme.scheme, scheme.group_size].append(projection.module)
    return dict(groups)


def targets(modules: Sequence[str], projections: Sequence[Projection], *, alone: bool) -> list[str]:
    """What names the modules of a group: every linear one if there is no other group."""
    if alone:
        return [EVERY_LINEAR]
    # What is ignored is so before any target is looked at, so that a target may match it too.
    quantised = [one.module for one in projections if one.is_quantised]
    patterns = covering(modules, quantised, by_regular_expression)
    return [f"re:{pattern.regular_expression()}" for pattern in patterns]


def ignored(projections: Sequence[Projection]) -> list[str]:
    """What names the modules that stay as they are."""
    left = [one.module for one in projections if not one.is_quantised]
    every = [one.module for one in projections]
    patterns = covering(left, every, by_regular_expression, subtrees=True)
    return [
        f"re:{pattern.regular_expression()}" if pattern.is_open else pattern.glob()
        for pattern in patterns
    ]


def weights(scheme: WeightScheme, group_size: int | None) -> dict[str, Any]:
    """Number format of the weights."""
    if scheme is WeightScheme.NVFP4:
        return {**float4(), "dynamic": False}
    return {
        "num_bits": 8 if scheme is WeightScheme.W8A8 else 4,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
    }


def input_activations(scheme: WeightScheme) -> dict[str, Any] | None:
    """Number format of the input."""
    if scheme is WeightScheme.W4A16:
        return None
    if scheme is WeightScheme.NVFP4:
        return {**float4(), "dynamic": "local", "observer": "static_minmax"}
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }


def float4() -> dict[str, Any]:
    """Float4 in blocks under e4m3 scales and a scale of the whole tensor."""
    return {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": BLOCK,
        "scale_dtype": SCALE_DTYPE,
        "zp_dtype": SCALE_DTYPE,
    }
