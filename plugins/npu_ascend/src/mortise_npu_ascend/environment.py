"""What the vendor's libraries read in the environment, read in this one place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

INT8_DISPATCH: Final = "DEEP_NORMAL_MODE_USE_INT8_QUANT"
STRATEGY: Final = "DEEP_USE_MODE"
EXPERT_COUNTS: Final = "MOE_EXPERT_TOKEN_NUMS_TYPE"
OWN_BUFFER: Final = "DEEPEP_HCCL_BUFFSIZE"
BUFFER: Final = "HCCL_BUFFSIZE"
OVER_PCIE: Final = "HCCL_INTRA_PCIE_ENABLE"
OVER_ROCE: Final = "HCCL_INTRA_ROCE_ENABLE"
VARIABLES: Final = (
    INT8_DISPATCH,
    EXPERT_COUNTS,
    STRATEGY,
    OWN_BUFFER,
    BUFFER,
    OVER_PCIE,
    OVER_ROCE,
)
"""All that are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VendorEnvironment:
    """Variables as the vendor's libraries find them; none is ever written, None is not set.

    Args:
        int8_dispatch: makes DeepEP quantise rows of its normal exchange where no argument says
            otherwise. It is one for the whole process: a quantised model and an unquantised draft
            cannot both be right. Only the text ``1`` does so.
        strategy: how DeepEP exchanges rows: ``default``, ``alltoall`` or ``ops``.
        expert_counts: what DeepEP's numbers of rows are: ``0`` where each expert's end, ``1`` or
            None how many there are.
        own_buffer: megabytes of DeepEP's communication buffer; goes before ``buffer``.
        buffer: megabytes of every communication buffer.
        over_pcie: with ``over_roce``, chooses the exchange in two levels between machines of A2.
        over_roce: see ``over_pcie``.
    """

    int8_dispatch: str | None = None
    strategy: str | None = None
    expert_counts: str | None = None
    own_buffer: str | None = None
    buffer: str | None = None
    over_pcie: str | None = None
    over_roce: str | None = None

    @property
    def forces_int8(self) -> bool:
        """Whether DeepEP quantises rows that it is not told to leave alone."""
        return self.int8_dispatch == "1"

    @property
    def counts_are_ends(self) -> bool:
        """Whether DeepEP's numbers of rows are cumulative."""
        return self.expert_counts == "0"

    @property
    def in_two_levels(self) -> bool:
        """Whether machines of A2 exchange rows in two levels."""
        return (self.over_pcie, self.over_roce) == ("1", "0")


def read_environment(environ: Mapping[str, str] = os.environ) -> VendorEnvironment:
    """Read every variable once; one that is set to nothing counts as not set."""

    def text(name: str) -> str | None:
        return environ.get(name, "").strip() or None

    return VendorEnvironment(
        int8_dispatch=text(INT8_DISPATCH),
        strategy=text(STRATEGY),
        expert_counts=text(EXPERT_COUNTS),
        own_buffer=text(OWN_BUFFER),
        buffer=text(BUFFER),
        over_pcie=text(OVER_PCIE),
        over_roce=text(OVER_ROCE),
    )
