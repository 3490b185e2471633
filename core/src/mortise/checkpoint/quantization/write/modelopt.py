"""Writing packed float4 as modelopt stores it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mortise import __version__
from mortise.checkpoint.directory import CONFIG_FILE
from mortise.checkpoint.quantization.write.covering import by_glob, covering
from mortise.checkpoint.save import STEM
from mortise.formats.nvfp4 import BLOCK

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from mortise.checkpoint.quantization.write.dialect import QuantisedModule, WrittenModel

QUANTIZATION_FILE: Final = "hf_quant_config.json"
ALGORITHM: Final = "NVFP4"


@dataclass(frozen=True, slots=True)
class ModelOptWriter:
    """Global scales multiply, and the configuration stands in two files, each in its own words."""

    stem: str = STEM

    def tensors(self, quantised: QuantisedModule) -> Mapping[str, torch.Tensor]:
        """See :class:`~mortise.checkpoint.quantization.write.dialect.DialectWriter`."""
        stored = quantised.stored
        assert stored.scale is not None
        assert stored.global_scale is not None and stored.input_scale is not None
        return {
            "weight": stored.weight,
            "weight_scale": stored.scale,
            "weight_scale_2": stored.global_scale.squeeze(0),
            "input_scale": stored.input_scale.squeeze(0),
        }

    def files(self, written: WrittenModel) -> Mapping[str, Mapping[str, Any]]:
        """See :class:`~mortise.checkpoint.quantization.write.dialect.DialectWriter`."""
        left = [one.module for one in written.projections if not one.is_quantised]
        every = [one.module for one in written.projections]
        excluded = [one.glob() for one in covering(left, every, by_glob, subtrees=True)]
        # Some programs read the file only if the producer has the dialect's name.
        producer = {"name": "modelopt", "version": f"mortise {__version__}"}
        numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
        group = {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}
        section = {
            "quant_method": "modelopt",
            "quant_algo": ALGORITHM,
            "config_groups": {"group_0": group},
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
