"""A projection as its checkpoint stores it: torch where it is float, a hook where it is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from mortise.checkpoint.placement import Placement
from mortise.errors import BackendUnusableError
from mortise.formats.weights import dequantise_weight
from mortise.layers.stored_tensors import StoredTensors
from mortise.spec.capabilities import LinearLayerRequest
from mortise.spec.reasons import ReasonCode
from mortise.spec.weights import LinearWeight, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mortise.backends.ops import Ops
    from mortise.checkpoint.quantization.module_scheme import SchemeLookup
    from mortise.layers.context import LayerContext


def linear(
    context: LayerContext,
    modules: Sequence[str],
    in_features: int,
    out_features: int,
    *,
    bias: bool = False,
    as_float: bool = False,
) -> Projection:
    """The projection of one module of the checkpoint, or of several fused along their outputs.

    Args:
        context: where the model is built.
        modules: dotted names in the checkpoint; several are equal parts of ``out_features``.
        in_features: K.
        out_features: N.
        bias: whether there is one.
        as_float: its weight is needed as a matrix of its own, not only in products with rows; a
            quantised one is then turned into floats once, when it has been loaded.

    Raises:
        QuantizationConfigError: fused modules are stored in different schemes.
    """
    stored = context.schemes.common_scheme(modules)
    if stored.scheme is WeightScheme.FLOAT:
        return nn.Linear(in_features, out_features, bias=bias)
    tensors = StoredTensors(
        stored, out_features, in_features, num_parts=len(modules), module=modules[0]
    )
    if as_float:
        assert not bias
        return DequantizedLinear(tensors)
    return QuantizedLinear(context.ops, modules[0], tensors, bias=bias)


class DequantizedLinear(nn.Module):
    """``y = x W^T`` with a weight that is stored quantised and used as floats.

    ``weight`` is ``[N, K]`` in the dtype of the run, once :meth:`finish_loading` has run.
    """

    weight: torch.Tensor

    def __init__(self, tensors: StoredTensors) -> None:
        super().__init__()
        self.tensors = tensors

    def finish_loading(self, compute_dtype: torch.dtype) -> None:
        """Turn the stored weight into floats; again after every weight update."""
        self.weight = dequantise_weight(self.tensors.record(), compute_dtype)

    def forward(self, rows_TK: torch.Tensor) -> torch.Tensor:
        """``[T, K]`` to ``[T, N]``."""
        return F.linear(rows_TK, self.weight)


class QuantizedLinear(nn.Module):
    """``y = x W^T + b`` with quantised weights, computed by the backend.

    Args:
        ops: the hooks bound for this role.
        name: dotted module name, for messages.
        tensors: the weight as stored.
    """

    def __init__(self, ops: Ops, name: str, tensors: StoredTensors, *, bias: bool) -> None:
        super().__init__()
        self.ops = ops
        self.name = name
        self.tensors = tensors
        self.bias = nn.Parameter(torch.empty(tensors.out_features)) if bias else None
        self._prepared: LinearWeight | None = None

    def finish_loading(self, compute_dtype: torch.dtype) -> None:
        """Lay the weight out for the kernel; again after every weight update.

        Raises:
            BackendUnusableError: the backend does not serve this projection.
        """
        self._require_support(compute_dtype)
        self._prepared = self.ops.prepare_linear_weight(
            LinearWeight(
                layer=self.name,
                stored=self.tensors.record(),
                bias=self.bias,
                out_features=self.tensors.out_features,
                in_features=self.tensors.in_features,
            )
        )

    @property
    def prepared(self) -> LinearWeight:
        """The weight as the backend laid it out."""
        assert self._prepared is not None, "finish_loading comes first"
        return self._prepared

    def forward(self, rows_TK: torch.Tensor) -> torch.Tensor:
        """``[T, K]`` to ``[T, N]``."""
        assert self._prepared is not None, "finish_loading comes first"
        return self.ops.quantized_linear(rows_TK, self._prepared, rows_TK.dtype)

    def _require_support(self, compute_dtype: torch.dtype) -> None:
        tensors = self.tensors
        support = self.ops.supports_linear(
            LinearLayerRequest(
                role=self.ops.role,
                layer=self.name,
                scheme=tensors.stored.scheme,
                out_features=tensors.out_features,
                in_features=tensors.in_features,
                num_groups=tensors.num_groups,
                static_input=tensors.stored.static_input,
                compute_dtype=compute_dtype,
            )
        )
        if not support.ok:
            raise BackendUnusableError(
                f"layer {self.name}: {support.reason}",
                reason=ReasonCode.REQUEST_UNSUPPORTED,
                details=[f"backend {self.ops.backend}"],
                remedy="use a backend that serves this projection, or the reference",
            )


Projection = nn.Linear | DequantizedLinear | QuantizedLinear


def float_weight(projection: nn.Module) -> torch.Tensor:
    """The weight ``[N, K]`` of a projection that was made ``as_float``."""
    assert isinstance(projection, nn.Linear | DequantizedLinear)
    return projection.weight


def projection_placements(
    schemes: SchemeLookup, modules: Sequence[str], projection: nn.Module
) -> Iterator[Placement]:
    """Where the tensors of a projection go.

    Args:
        schemes: what the projection was built with.
        modules: dotted names in the checkpoint, as :func:`linear` was given them.
        projection: what it made.
    """
    if isinstance(projection, nn.Linear):
        weights = projection.weight.chunk(len(modules), dim=0)
        for module, weight in zip(modules, weights, strict=True):
            yield Placement(f"{module}.weight", weight)
    else:
        assert isinstance(projection, DequantizedLinear | QuantizedLinear)
        yield from stored_placements(schemes, modules, projection.tensors)
    bias = getattr(projection, "bias", None)
    if bias is not None:
        for module, part in zip(modules, bias.chunk(len(modules)), strict=True):
            yield Placement(f"{module}.bias", part)


def stored_placements(
    schemes: SchemeLookup,
    modules: Sequence[str],
    tensors: StoredTensors,
    expert: int | None = None,
) -> Iterator[Placement]:
    """Where the tensors of the parts of a stored weight go, of one expert if there are several."""
    for number, module in enumerate(modules):
        part = tensors.part(number, expert)
        if part.scheme is WeightScheme.FLOAT:
            yield Placement(f"{module}.weight", part.weight)
        else:
            yield from schemes.placements(module, part, tensors.stored)
