"""Muon for matrices and AdamW for everything else.

Muon orthogonalises the momentum of each matrix by a Newton-Schulz iteration (Keller Jordan, "Muon:
An optimizer for hidden layers", 2024). Scaling the update by 0.2 sqrt(max(out, in)) gives it
AdamW's typical size, so that AdamW's learning rates and decoupled weight decay apply ("Muon is
Scalable for LLM Training", arXiv 2502.16982, section 2.2: the Moonlight recipe).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

NEWTON_SCHULZ_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS: Final = 5
UPDATE_RMS: Final = 0.2
SMALLEST_NORM: Final = 1e-7
# At the full rate every router ran to the same few experts within ten steps, all tokens agreeing.
GATE_RATE_SCALE: Final = 0.1


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return bfloat16 matrices [N, out, in] with the singular vectors given and values near 1.

    The quintic iteration does not converge: singular values end between about 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    Args:
        parameters: tensors of two or more dimensions; all but the last two are batch, so that
            expert weights [E, out, in] are E matrices.
        lr: learning rate, of the size one would give AdamW.
        momentum: decay of the momentum.
        weight_decay: decoupled, multiplied by the learning rate.

    A group's `parts` says of how many matrices, one below the other, its parameters are made: two
    where gate and up projection share a tensor.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; equal shapes are orthogonalised together."""
        assert closure is None, "a closure is not supported"
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shape = (parameter.shape[-2] // group["parts"], parameter.shape[-1])
                    by_shape.setdefault(shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                self._update(parameters, shape, group)

    def _update(
        self, parameters: Sequence[Tensor], shape: tuple[int, int], group: dict[str, Any]
    ) -> None:
        """Update parameters whose matrices have one shape, as one batch of matrices."""
        momentum, rate = group["momentum"], group["lr"]
        directions = [self._nesterov(p, momentum).reshape(-1, *shape) for p in parameters]
        updates = torch.split(orthogonalise(torch.cat(directions)), [len(d) for d in directions])
        scale = UPDATE_RMS * max(shape) ** 0.5
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - rate * group["weight_decay"])
            parameter.add_(update.reshape(parameter.shape).to(parameter.dtype), alpha=-rate * scale)

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        """Take the gradient into the parameter's momentum and return the look-ahead of it."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum"]
        assert parameter.grad is not None
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)


def uses_muon(name: str, parameter: Tensor) -> bool:
    """Tell whether Muon trains this parameter: a matrix, but no embedding and no router gate."""
    is_embedding = "embed_tokens" in name or "lm_head" in name
    return parameter.dim() >= 2 and not is_embedding and not is_gate(name)


def is_gate(name: str) -> bool:
    """Tell whether this parameter is a router's matrix."""
    return name.endswith("gate.weight")


def build(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    momentum: float,
    weight_decay: float,
    betas: tuple[float, float],
    epsilon: float,
) -> list[torch.optim.Optimizer]:
    """Return Muon and AdamW over the parameters, in groups for the model and for its indexers.

    Every group carries `is_indexer` and `rate_scale`; the schedule sets its learning rate, which
    the scale multiplies, before each step.
    """
    groups: dict[tuple[bool, bool, int, float], list[Tensor]] = {}
    for name, parameter in named_parameters:
        rate_scale = GATE_RATE_SCALE if is_gate(name) else 1.0
        key = (uses_muon(name, parameter), ".indexer." in name, num_parts(name), rate_scale)
        groups.setdefault(key, []).append(parameter)
    matrices, others = (
        [
            {"params": parameters, "is_indexer": is_indexer, "parts": parts, "rate_scale": scale}
            for (muon, is_indexer, parts, scale), parameters in groups.items()
            if muon is wanted
        ]
        for wanted in (True, False)
    )
    return [
        Muon(matrices, lr=0.0, momentum=momentum, weight_decay=weight_decay),
        torch.optim.AdamW(others, lr=0.0, betas=betas, eps=epsilon, weight_decay=0.0, fused=True),
    ]


def num_parts(name: str) -> int:
    """Return of how many matrices a parameter is made: gate and up projection share a tensor."""
    return 2 if name.endswith(("gate_up_proj.weight", "w13.weight")) else 1
