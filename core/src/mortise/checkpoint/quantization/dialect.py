"""What every dialect of quantised checkpoints answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from mortise.checkpoint.placement import Skip

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise.checkpoint.placement import Placement
    from mortise.checkpoint.quantization.entries import Entry
    from mortise.checkpoint.quantization.module_scheme import ModuleScheme
    from mortise.spec.weights import StoredWeight

CACHE_SCALES: Final = Skip(
    r".+\.(?:k_scale|v_scale|kv_scale)", "keys and values are cached unquantised"
)


@dataclass(frozen=True, slots=True)
class Statement:
    """What a checkpoint says of a module, whatever its tensors are.

    Args:
        said: by which file, and what.
        is_quantised: whether it says that the module is quantised.
    """

    said: str
    is_quantised: bool


class Dialect(Protocol):
    """How one program writes quantised modules: their tensors, and what it says of them."""

    def scheme(self, module: str) -> ModuleScheme:
        """How a module of which the checkpoint holds tensors is stored.

        Raises:
            QuantizationConfigError: the scheme is not known, or the tensors contradict what is
                said of them.
        """
        ...

    def statement(self, module: str) -> Statement:
        """What the files beside the tensors say of a module."""
        ...

    def needed(self, module: str, scheme: ModuleScheme) -> tuple[str, ...]:
        """Last parts of the names of the tensors without which a quantised module is not whole."""
        ...

    def placements(
        self, module: str, target: StoredWeight, scheme: ModuleScheme
    ) -> Iterator[Placement]:
        """Where the tensors of a quantised module go."""
        ...

    def skips(self) -> tuple[Skip, ...]:
        """Tensors beside the weights that inference does without."""
        ...

    def entries(self) -> Iterator[Entry]:
        """What its lists of modules name."""
        ...
