"""Watching what every projection of a running model is given."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from mortise.checkpoint.quantization.write.input_range import InputRange
from mortise.layers.moe import MoELayer
from mortise.models.registry import family_of
from mortise.spec.dispatch import RowLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mortise.checkpoint.placement import Placement
    from mortise.engine.loading import LoadedModel
    from mortise.spec.dispatch import DispatchedTokens
    from mortise.spec.experts import ExpertWeights

    Apply = Callable[[DispatchedTokens, ExpertWeights, torch.dtype], torch.Tensor]


@dataclass(slots=True)
class InputRanges:
    """The range of the input of each module, by its name in the checkpoint."""

    ranges: dict[str, InputRange] = field(default_factory=dict)

    def see(self, modules: Iterable[str], rows: torch.Tensor) -> None:
        """Note what several modules were given; no rows are nothing."""
        if not rows.numel():
            return
        low, high = rows.aminmax()
        seen = InputRange(float(low), float(high))
        for module in modules:
            known = self.ranges.get(module)
            self.ranges[module] = seen if known is None else known.union(seen)

    def share(self, modules: Iterable[str]) -> None:
        """Give modules that saw nothing the range that holds those of all the others."""
        names = list(modules)
        known = [self.ranges[name] for name in names if name in self.ranges]
        if not known:
            return
        widest = known[0]
        for one in known[1:]:
            widest = widest.union(one)
        for name in names:
            self.ranges.setdefault(name, widest)


class WeightNames:
    """Which modules of the checkpoint fill which part of a parameter.

    Args:
        placements: of the model.
    """

    def __init__(self, placements: Iterable[Placement]) -> None:
        self._parts: dict[int, list[tuple[int, str]]] = defaultdict(list)
        for placement in placements:
            module, _, leaf = placement.name.rpartition(".")
            if leaf == "weight":
                target = placement.target
                place = target.untyped_storage().data_ptr()
                self._parts[place].append((int(target.storage_offset()), module))

    def within(self, weight: torch.Tensor) -> list[str]:
        """The modules whose weights make up a parameter, or a view of a part of one."""
        first = weight.storage_offset()
        parts = self._parts[weight.untyped_storage().data_ptr()]
        return [module for start, module in parts if first <= start < first + weight.numel()]


@contextmanager
def observed_inputs(loaded: LoadedModel) -> Iterator[InputRanges]:
    """Watch an unquantised model while the block runs; afterwards every expert has a range.

    An expert that no token reached is given the range of all experts of its layer.

    Args:
        loaded: a model in one process, computed by the reference, with its draft if it has one.
    """
    names = WeightNames(_placements(loaded))
    seen = InputRanges()
    modules = _modules(loaded)
    experts = [module for module in modules if isinstance(module, MoELayer)]
    before = [layer.context for layer in experts]
    handles = [
        module.register_forward_pre_hook(_linear_observer(seen, names.within(module.weight)))
        for module in modules
        if isinstance(module, nn.Linear)
    ]
    try:
        for layer in experts:
            apply = _experts_observer(seen, names, layer.context.ops.quantized_moe_apply)
            ops = replace(layer.context.ops, quantized_moe_apply=apply)
            layer.context = replace(layer.context, ops=ops)
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for layer, context in zip(experts, before, strict=True):
            layer.context = context
    for layer in experts:
        _share_within(seen, names, layer)


def _placements(loaded: LoadedModel) -> Iterator[Placement]:
    yield from family_of(loaded.directory.config).placements(loaded.model)
    if loaded.draft is not None:
        family = family_of(loaded.draft.directory.config)
        yield from family.draft_placements(loaded.draft.model, loaded.model)


def _modules(loaded: LoadedModel) -> list[nn.Module]:
    roots = [loaded.model, *(() if loaded.draft is None else (loaded.draft.model,))]
    return [module for root in roots if isinstance(root, nn.Module) for module in root.modules()]


def _linear_observer(
    seen: InputRanges, modules: list[str]
) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def observe(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        seen.see(modules, arguments[0])

    return observe


def _experts_observer(seen: InputRanges, names: WeightNames, apply: Apply) -> Apply:
    """The same product, having noted what it is made of."""

    def observe(
        tokens: DispatchedTokens, experts: ExpertWeights, out_dtype: torch.dtype
    ) -> torch.Tensor:
        if tokens.receive is not None:
            tokens.receive()
        assert tokens.format.row_layout is RowLayout.GROUPED and tokens.group_counts is not None
        used = tokens.rows[: sum(tokens.group_counts)]
        for expert, rows_RH in enumerate(used.split(tokens.group_counts)):
            w13, w2 = experts.w13.weight[expert], experts.w2.weight[expert]
            seen.see(names.within(w13), rows_RH)
            gate_RI, up_RI = F.linear(rows_RH, w13).chunk(2, dim=-1)
            seen.see(names.within(w2), F.silu(gate_RI) * up_RI)
        return apply(tokens, experts, out_dtype)

    return observe


def _share_within(seen: InputRanges, names: WeightNames, layer: MoELayer) -> None:
    record = layer.experts.record(layer.name)
    for stored in (record.w13, record.w2):
        seen.share(names.within(stored.weight))
