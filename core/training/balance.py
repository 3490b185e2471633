"""Even load of the experts without a loss: each router's correction bias follows its load.

"Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (arXiv 2408.15664).
Shape suffix: E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mortise.layers.router import GroupedSigmoidRouter
    from mortise.spec.dispatch import Routing


class LoadBalancer:
    """Counts the tokens that each router sends to each expert, and corrects its bias by the sign.

    Only passes that record gradients, or run under `torch.enable_grad`, are counted.
    """

    def __init__(self, routers: Iterable[GroupedSigmoidRouter]) -> None:
        self.routers = tuple(routers)
        self.loads = [torch.zeros_like(r.e_score_correction_bias) for r in self.routers]
        for router, load_E in zip(self.routers, self.loads, strict=True):
            router.register_forward_hook(_counter(load_E))

    def update(self, rate: float) -> float:
        """Move each bias by `rate` against its expert's excess load; forget the counts.

        Returns:
            The largest load of an expert, in units of the mean load of its router.
        """
        worst = 0.0
        for router, load_E in zip(self.routers, self.loads, strict=True):
            mean = load_E.mean()
            if mean > 0:
                worst = max(worst, float(load_E.max() / mean))
                router.e_score_correction_bias += rate * (mean - load_E).sign()
            load_E.zero_()
        return worst


def _counter(load_E: torch.Tensor) -> Any:
    def count(_: object, __: object, routing: Routing) -> None:
        if torch.is_grad_enabled():
            load_E.add_(routing.topk_ids.flatten().bincount(minlength=len(load_E)))

    return count
