"""The tensors of a checkpoint by the module they belong to, from the headers alone."""

from __future__ import annotations

from collections import defaultdict
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mortise.checkpoint.tensors import CheckpointTensors, StoredTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of tensors that are not quantised, and of scales beside those that are."""


def dtype_name(stored: StoredTensor) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(stored.dtype).removeprefix("torch.")


class StoredModules:
    """What the headers say, module by module.

    A tensor ``model.norm.weight`` is the leaf ``weight`` of the module ``model.norm``.

    Args:
        tensors: the opened checkpoint.
    """

    def __init__(self, tensors: CheckpointTensors) -> None:
        self.tensors = tensors
        modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        for name in tensors.names():
            module, _, leaf = name.rpartition(".")
            modules[module][leaf] = tensors.stored(name)
        self._modules = dict(modules)

    def __contains__(self, module: str) -> bool:
        return module in self._modules

    def names(self) -> Iterator[str]:
        """Every module that holds a tensor itself."""
        return iter(self._modules)

    def leaves(self, module: str) -> Mapping[str, StoredTensor]:
        """The tensors of a module itself, by the last part of their names; none if it has none."""
        return MappingProxyType(self._modules.get(module, {}))
