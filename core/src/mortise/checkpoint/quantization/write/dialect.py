"""What the writer of every dialect answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from mortise.checkpoint.quantization.write.projections import Projection
    from mortise.spec.weights import StoredWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedModule:
    """A projection that was quantised.

    Args:
        module: its dotted name.
        stored: its weight.
        bias: as the model has it, or None.
        float_dtype: of the weight before.
    """

    module: str
    stored: StoredWeight
    bias: torch.Tensor | None
    float_dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenModel:
    """What a checkpoint says of itself is made of.

    Args:
        config: ``config.json`` of the unquantised model.
        projections: every projection and its scheme.
        tensors: every tensor that was written, and the quantised projection that it is of.
    """

    config: Mapping[str, Any]
    projections: Sequence[Projection]
    tensors: Mapping[str, Projection | None]


class DialectWriter(Protocol):
    """How one program stores quantised modules, and what it says of them."""

    @property
    def stem(self) -> str:
        """What the names of its safetensors files begin with."""
        ...

    def tensors(self, quantised: QuantisedModule) -> Mapping[str, torch.Tensor]:
        """The tensors of a module, by the last part of their names."""
        ...

    def files(self, written: WrittenModel) -> Mapping[str, Mapping[str, Any]]:
        """The JSON objects that belong to the checkpoint, by name of their file."""
        ...
