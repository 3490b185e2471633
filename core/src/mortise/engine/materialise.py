"""Giving memory to a model that was built without any."""

from __future__ import annotations

import torch
from torch import nn

from mortise.engine.memory import memory_for


def materialise(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replace every tensor on the meta device by an empty one, once.

    Parameters take ``dtype``; buffers keep the one that they were made with, because a buffer that
    must be more precise than the run says so. Nothing process-wide is touched: a default dtype or
    device would be seen by every other thread.

    Raises:
        CapacityError: the device has not enough memory.
    """
    needed = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    needed += sum(buffer.nbytes for buffer in model.buffers())
    remedy = "use a device with more memory, or a smaller model"
    with memory_for("the parameters of the model", needed, device, remedy):
        for module in model.modules():
            assert not module._non_persistent_buffers_set, "its contents would be lost"
            for name, parameter in list(module.named_parameters(recurse=False)):
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                setattr(module, name, nn.Parameter(empty, requires_grad=False))
            for name, buffer in list(module.named_buffers(recurse=False)):
                # Not empty_like: from the meta device it imports a second's worth of Python.
                empty = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
                setattr(module, name, empty)
