"""Tensors that a draft's checkpoint stores once more, though the draft has the main model's."""

from __future__ import annotations

import torch

from mortise.checkpoint.placement import Placement, Read
from mortise.errors import TensorMismatchError


def same_as_main(name: str, parameter: torch.Tensor, what: str) -> Placement:
    """A tensor that may be there, and then must be what the main model holds.

    Args:
        name: in the draft's checkpoint.
        parameter: the main model's, loaded; it keeps its values.
        what: what it is called in messages: ``embedding``, ``head``.

    Returns:
        A placement that raises a :class:`~mortise.errors.TensorMismatchError` for other values.
    """

    def compare(stored: torch.Tensor, read: Read) -> torch.Tensor:  # noqa: ARG001
        if not torch.equal(stored.to(parameter.dtype), parameter.cpu()):
            raise TensorMismatchError(
                f"tensor {name} differs from the main model's {what}",
                expected=f"the main model's {what}, which the draft shares",
                remedy="take the draft from the same release of the model as the main model",
            )
        return parameter

    return Placement(name, parameter, optional=True, convert=compare)
