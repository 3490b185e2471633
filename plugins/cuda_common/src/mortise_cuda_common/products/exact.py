"""float32 weights, multiplied by torch in float32: for models that are run to be exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from mortise_cuda_common.products.base import Product
from mortise_cuda_common.rows import Kind, Rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mortise_cuda_common.groups import Groups


@dataclass(frozen=True, slots=True)
class ExactProduct(Product):
    """FLOAT of float32.

    Args:
        weight: ``[E_l, N, K]``, the stored one.
    """

    weight: torch.Tensor

    @property
    def takes(self) -> Kind:
        """Rows of float32."""
        return Kind.PLAIN

    def quantise(self, plain_RK: torch.Tensor, groups: Groups) -> Rows:
        """The rows as they are."""
        return Rows(values=plain_RK, kind=Kind.PLAIN)

    def multiply(self, rows: Rows, groups: Groups, out_dtype: torch.dtype) -> torch.Tensor:
        """One product an expert; masked rows all at once, whose undefined rows give such."""
        if groups.capacity is not None:
            slots_ECK = rows.values.unflatten(0, (groups.num_groups, groups.capacity))
            return torch.bmm(slots_ECK, self.weight.mT).flatten(0, 1).to(out_dtype)
        sums_RN = rows.values.new_empty((groups.num_rows, self.weight.shape[1]), dtype=out_dtype)
        for expert, place in _places(groups):
            sums_RN[place] = F.linear(rows.values[place], self.weight[expert]).to(out_dtype)
        return sums_RN

    def fused_gate_up(self, rows: Rows, groups: Groups, then: Product) -> Rows | None:
        """SwiGLU as torch takes it; of undefined rows too, which nobody reads."""
        if then.takes is not Kind.PLAIN:
            return None
        gate_RI, up_RI = self.multiply(rows, groups, torch.float32).chunk(2, dim=-1)
        return Rows(values=F.silu(gate_RI) * up_RI, kind=Kind.PLAIN)


def _places(groups: Groups) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and where; waits for the device if the host has no counts."""
    counts = groups.host_counts
    start = 0
    for expert, count in enumerate(groups.counts.tolist() if counts is None else counts):
        if count:
            yield expert, slice(start, start + count)
        start += -(-count // groups.alignment) * groups.alignment
