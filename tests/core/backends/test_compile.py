from __future__ import annotations

import torch

from mortise.backends import load_backend
from mortise.plugin import QKVLayout, QKVShape
from mortise.spec.roles import ModelRole

SHAPE = QKVShape(
    num_key_heads=1,
    num_value_heads=1,
    key_head_dim=2,
    value_head_dim=3,
    layout=QKVLayout.CONTIGUOUS,
)


def test_a_bound_hook_is_traced_as_part_of_the_whole_graph() -> None:
    """The guard round a hook must not break the graph, as a wrapper of pluggy's would."""
    ops = load_backend("reference", role=ModelRole.MAIN).ops

    def layer(qkvz: torch.Tensor, ba: torch.Tensor) -> torch.Tensor:
        return ops.qkv_split(qkvz, ba, SHAPE).z * 2

    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    qkvz, ba = torch.arange(20.0).view(2, 10), torch.arange(4.0).view(2, 2)
    assert torch.equal(compiled(qkvz, ba), layer(qkvz, ba))
