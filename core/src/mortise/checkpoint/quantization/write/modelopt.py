"""Writing packed float4 as modelopt stores it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mortise import __version__
from mortise.checkpoint.directory import CONFIG_FILE
from mortise.checkpoint.quantization.write.covering import (
    by_glob,
    by_regular_expression,
    covering,
)
from mortise.checkpoint.save import STEM
from mortise.formats.nvfp4 import BLOCK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from mortise.checkpoint.quantization.write.dialect import QuantisedModule, WrittenModel
    from mortise.checkpoint.quantization.write.projections import Projection

QUANTIZATION_FILE: Final = "hf_quant_config.json"
ALGORITHM: Final = "NVFP4"


@dataclass(frozen=True, slots=True)
class ModelOptWriter:
    """Global scales multiply, and the configuration stands in two files, each in its own words."""

    stem: str = STEM

    def tensors(self, quantised: QuantisedModule) -> Mapping[str, torch.Tensor]:
        """See :class:`~mortise.checkpoint.quantization.write.dialect.DialectWriter`."""
        stored = quantised.stored
        assert stored.scale is not None and stored.global_scale is not None
        found = {
            "weight": stored.weight,
            "weight_scale": stored.scale,
            "weight_scale_2": stored.global_scale.squeeze(0),
        }
        if stored.input_scale is not None:
            found["input_scale"] = stored.input_scale.squeeze(0)
        return found

    def files(self, written: WrittenModel) -> Mapping[str, Mapping[str, Any]]:
        """See :class:`~mortise.checkpoint.quantization.write.dialect.DialectWriter`."""
        left = [one.module for one in written.projections if not one.is_quantised]
        every = [one.module for one in written.projections]
        excluded = [one.glob() for one in covering(left, every, by_glob, subtrees=True)]
        # Some programs read the file only if the producer has the dialect's name.
        producer = {"name": "modelopt", "version": f"mortise {__version__}"}
        section = {
            "quant_method": "modelopt",
            "quant_algo": ALGORITHM,
            "config_groups": config_groups(written.projections),
            "ignore": excluded,
            "producer": producer,
        }
        own_file = {
            "producer": producer,
            "quantization": {
                "quant_algo": ALGORITHM,
                "kv_cache_quant_algo": None,
                "group_size": BLOCK,
                "exclude_modules": excluded,
            },
        }
        return {
            CONFIG_FILE: {**written.config, "quantization_config": section},
            QUANTIZATION_FILE: own_file,
        }


def config_groups(projections: Sequence[Projection]) -> dict[str, Any]:
    """The number formats, in the words that other programs have for them.

    A module without a scale of its input, which says the same, is quantised in its weight alone.
    """
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    both = {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}
    quantised = [one for one in projections if one.is_quantised]
    weights_only = [one.module for one in quantised if not one.scheme.static_input]
    if not weights_only:
        return {"group_0": both}
    patterns = covering(weights_only, [one.module for one in quantised], by_regular_expression)
    targets = [f"re:{pattern.regular_expression()}" for pattern in patterns]
    return {"group_0": both, "group_1": {"weights": numbers, "targets": targets}}
