"""Memory for the weights of a projection in the form in which the checkpoint stores them."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import nn

from mortise.errors import QuantizationConfigError
from mortise.formats.weights import stored_layout
from mortise.spec.weights import StoredWeight, WeightScheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mortise.checkpoint.quantization.module_scheme import ModuleScheme
    from mortise.formats.layout import TensorLayout

TENSOR_FIELDS = tuple(
    name.name
    for name in fields(StoredWeight)
    if name.name not in {"scheme", "num_parts", "scale_format"}
)


class StoredTensors(nn.Module):
    """The tensors of one projection, or of the same projection of several experts.

    An unquantised weight is a parameter and takes the dtype of the run; the tensors of every other
    scheme are buffers and keep their own.

    Args:
        stored: the scheme.
        out_features, in_features: N and K.
        num_parts: equal parts of N that the checkpoint stores apart.
        num_experts: experts, or None for a single projection.
        module: dotted name in the checkpoint, of the first one if there are several.

    Raises:
        QuantizationConfigError: the scheme cannot store a projection of these sizes.
    """

    def __init__(
        self,
        stored: ModuleScheme,
        out_features: int,
        in_features: int,
        *,
        num_parts: int = 1,
        num_experts: int | None = None,
        module: str,
    ) -> None:
        super().__init__()
        self.stored = stored
        self.num_parts = num_parts
        self.out_features = out_features
        self.in_features = in_features
        leading = () if num_experts is None else (num_experts,)
        for name, (shape, dtype) in self._layout(module).items():
            empty = torch.empty(*leading, *shape, dtype=dtype)
            if stored.scheme is WeightScheme.FLOAT:
                self.register_parameter(name, nn.Parameter(empty))
            else:
                self.register_buffer(name, empty)

    def _layout(self, module: str) -> Mapping[str, TensorLayout]:
        try:
            return stored_layout(
                self.stored.scheme,
                self.out_features,
                self.in_features,
                num_groups=self.num_groups,
                num_parts=self.num_parts,
                static_input=self.stored.static_input,
                asymmetric_input=self.stored.asymmetric_input,
                float_dtype=torch.get_default_dtype(),
            )
        except QuantizationConfigError as error:
            raise QuantizationConfigError(
                f"module {module}: {error.what}",
                details=[f"stored as {self.stored.scheme.value}: {self.stored.reason}"],
                expected=error.expected,
                remedy=error.remedy or "use a version of the model that leaves it unquantised",
            ) from None

    @property
    def num_groups(self) -> int:
        """Groups of columns that share a scale."""
        return self.stored.num_groups(self.in_features)

    def record(self) -> StoredWeight:
        """All of it, as the hooks take it."""
        return self._record({name: self._tensor(name) for name in TENSOR_FIELDS}, self.num_parts)

    def part(self, number: int, expert: int | None = None) -> StoredWeight:
        """Views of the share of one part, to be filled from its own module of the checkpoint.

        Args:
            number: which of the equal parts of N.
            expert: which expert, where there are several.
        """
        views = {}
        for name in TENSOR_FIELDS:
            tensor = self._tensor(name)
            if tensor is not None:
                tensor = tensor if expert is None else tensor[expert]
                tensor = tensor.chunk(self.num_parts, dim=0)[number]
            views[name] = tensor
        return self._record(views, 1)

    def _tensor(self, name: str) -> torch.Tensor | None:
        tensor: torch.Tensor | None = getattr(self, name, None)
        return tensor

    def _record(self, tensors: dict[str, torch.Tensor | None], num_parts: int) -> StoredWeight:
        weight = tensors["weight"]
        assert weight is not None
        return StoredWeight(
            scheme=self.stored.scheme,
            weight=weight,
            scale=tensors["scale"],
            global_scale=tensors["global_scale"],
            input_scale=tensors["input_scale"],
            input_offset=tensors["input_offset"],
            num_parts=num_parts,
            scale_format=self.stored.scale_format,
        )
