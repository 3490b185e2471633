"""Writing float8 blocks as DeepSeek publishes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mortise.checkpoint.directory import CONFIG_FILE
from mortise.checkpoint.save import STEM
from mortise.formats.fp8 import GROUP
from mortise.spec.weights import ScaleFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from mortise.checkpoint.quantization.write.dialect import QuantisedModule, WrittenModel


@dataclass(frozen=True, slots=True)
class Fp8BlockWriter:
    """``weight`` and ``weight_scale_inv``, which multiplies in spite of its name.

    Modules that are left are listed by their full names: of the programs that read the list, some
    match whole names, some beginnings and some any part.
    """

    scale_format: ScaleFormat = ScaleFormat.FLOAT32
    stem: str = STEM

    def tensors(self, quantised: QuantisedModule) -> Mapping[str, torch.Tensor]:
        """See :class:`~mortise.checkpoint.quantization.write.dialect.DialectWriter`."""
        stored = quantised.stored
        assert stored.scale is not None
        return {"weight": stored.weight, "weight_scale_inv": stored.scale}

    def files(self, written: WrittenModel) -> Mapping[str, Mapping[str, Any]]:
        """See :class:`~mortise.checkpoint.quantization.write.dialect.DialectWriter`."""
        section: dict[str, Any] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [GROUP, GROUP],
        }
        if self.scale_format is ScaleFormat.UE8M0:
            section["scale_fmt"] = self.scale_format.value
        section["modules_to_not_convert"] = [
            one.module for one in written.projections if not one.is_quantised
        ]
        return {CONFIG_FILE: {**written.config, "quantization_config": section}}
