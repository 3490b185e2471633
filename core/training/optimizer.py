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
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; equal shapes are orthogonalised together."""
        assert closure is None, "a closure is not supported"
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shape = (parameter.shape[-2], parameter.shape[-1])
                    by_shape.setdefault(shape, []).append(parameter)
            for (out_size, in_size), parameters in by_shape.items():
                scale = UPDATE_RMS * max(out_size, in_size) ** 0.5
                self._update(parameters, group, scale)

    def _update(self, parameters: Sequence[Tensor], group: dict[str, Any], scale: float) -> None:
        """Update parameters whose matrices have one shape, as one batch of matrices."""
        directions = [
            self._nesterov(parameter, group["momentum"]).flatten(0, -3)
            if parameter.dim() > 2
            else self._nesterov(parameter, group["momentum"])[None]
            for parameter in parameters
        ]
        updates = orthogonalise(torch.cat(directions)).split([len(d) for d in directions])
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            step = update.reshape(parameter.shape).to(parameter.dtype)
            parameter.add_(step, alpha=-group["lr"] * scale)

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
    embedding_or_gate = "embed_tokens" in name or "lm_head" in name or name.endswith("gate.weight")
    return parameter.dim() >= 2 and not embedding_or_gate


def build(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    momentum: float,
    weight_decay: float,
    betas: tuple[float, float],
    epsilon: float,
) -> list[torch.optim.Optimizer]:
    """Return Muon and AdamW over the parameters, a group each for the model and for its indexers.

    Every group carries `is_indexer`; learning rates are set by the schedule before each step.
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in named_parameters:
        key = (uses_muon(name, parameter), ".indexer." in name)
        groups.setdefault(key, []).append(parameter)
    matrices = [_group(groups, True, is_indexer) for is_indexer in (False, True)]
    others = [_group(groups, False, is_indexer) for is_indexer in (False, True)]
    muon = Muon(matrices, lr=0.0, momentum=momentum, weight_decay=weight_decay)
    adamw = torch.optim.AdamW(
        others, lr=0.0, betas=betas, eps=epsilon, weight_decay=0.0, fused=True
    )
    return [muon, adamw]


def _group(
    groups: dict[tuple[bool, bool], list[Tensor]], is_matrix: bool, is_indexer: bool
) -> dict[str, Any]:
    return {"params": groups.get((is_matrix, is_indexer), []), "is_indexer": is_indexer}
