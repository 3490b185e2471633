"""Layers of experts in every form that a backend claims, and rows for them in every arrangement."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

from mortise.conformance.draws import FORMS, Form, draw_rows, draw_weight
from mortise.conformance.records import FaultError, NotAskedError
from mortise.conformance.tolerances import Tolerance, of_experts
from mortise.formats.rows import quantise_rows
from mortise.plugin import (
    DispatchDecision,
    DispatchDtype,
    DispatchedTokens,
    DispatchFormat,
    DispatchMode,
    DispatchRequest,
    ExpertLayerRequest,
    ExpertMethod,
    ExpertWeights,
    GroupListKind,
    ModelRole,
    Override,
    RowLayout,
    StoredWeight,
    WeightScheme,
    ordinary_method,
)
from mortise.testing.poison import defined_rows, poison_undefined_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mortise.backends import Ops
    from mortise.conformance.subject import Subject
    from mortise.plugin import Capabilities

LAYER: Final = "model.layers.3.mlp"
NUM_EXPERTS: Final = 4
INPUT_GLOBAL_SCALE: Final = 4 / 2688

GATE_AND_UP_SIZES: Final = (4.0, 0.25)
"""Where ``silu`` is nearly linear or nearly a ramp, gate and up may be exchanged and their product
hardly shows it: a large gate and a small up do."""

COUNTS: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {
        "uneven groups, one empty": (5, 0, 1, 9),
        "equal groups": (3, 3, 3, 3),
        "one expert has all rows": (0, 17, 0, 0),
        "one row": (0, 0, 0, 1),
        "more rows than a tile": (130, 0, 64, 257),
        "no rows": (0, 0, 0, 0),
    }
)
"""Rows of each expert."""

USUAL_COUNTS: Final = COUNTS["uneven groups, one empty"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCase:
    """One layer.

    Args:
        w13, w2: how the projections are stored.
        dtype: compute dtype.
        hidden, intermediate: H and I.
    """

    w13: Form
    w2: Form
    dtype: torch.dtype
    hidden: int = 256
    intermediate: int = 128

    def __str__(self) -> str:
        forms = f"{self.w13}" if self.w13 == self.w2 else f"{self.w13}+{self.w2}"
        return f"{forms}-{self.hidden}x{self.intermediate}-{str(self.dtype)[6:]}"

    @property
    def subject(self) -> str:
        """Hook and scheme."""
        return f"quantized_moe_apply of {self.w13.scheme.value}"

    @property
    def request(self) -> ExpertLayerRequest:
        """What ``supports`` is asked."""
        return ExpertLayerRequest(
            role=ModelRole.MAIN,
            layer=LAYER,
            scheme_w13=self.w13.scheme,
            scheme_w2=self.w2.scheme,
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=2,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            compute_dtype=self.dtype,
            num_local_experts=NUM_EXPERTS,
            static_input=self.w13.static_input,
            num_groups_w13=self.w13.num_groups(self.hidden),
            num_groups_w2=self.w2.num_groups(self.intermediate),
        )

    def weights(self, seed: int = 0) -> ExpertWeights:
        """Stored on the CPU, unprepared."""
        return ExpertWeights(
            layer=LAYER,
            w13=draw_weight(
                self.w13,
                2 * self.intermediate,
                self.hidden,
                part_sizes=GATE_AND_UP_SIZES,
                leading=(NUM_EXPERTS,),
                seed=seed,
                float_dtype=self.dtype,
            ),
            w2=draw_weight(
                self.w2,
                self.hidden,
                self.intermediate,
                leading=(NUM_EXPERTS,),
                seed=seed + 1,
                float_dtype=self.dtype,
            ),
            num_local_experts=NUM_EXPERTS,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
        )

    def tolerance(self, rows: int) -> Tolerance:
        """How far so many rows may be off."""
        return of_experts(
            self.w13.scheme,
            self.w2.scheme,
            self.dtype,
            self.hidden,
            self.intermediate,
            rows,
            static_w13=self.w13.static_input,
            static_w2=self.w2.static_input,
        )


def layers(capabilities: Capabilities) -> Iterator[ExpertCase]:
    """Every form of every claimed scheme, in each compute dtype; sizes that fill tiles or not."""
    for dtype in capabilities.compute_dtypes:
        for scheme in WeightScheme:
            if scheme in capabilities.schemes:
                for form in FORMS[scheme]:
                    yield ExpertCase(w13=form, w2=replace(form, asymmetric=False), dtype=dtype)
                form = FORMS[scheme][0]
                yield ExpertCase(w13=form, w2=form, dtype=dtype, hidden=160, intermediate=96)
                if scheme is not WeightScheme.FLOAT and WeightScheme.FLOAT in capabilities.schemes:
                    yield ExpertCase(w13=form, w2=FORMS[WeightScheme.FLOAT][0], dtype=dtype)


def plain_layers(capabilities: Capabilities) -> Iterator[ExpertCase]:
    """The plainest form of every claimed scheme, in each compute dtype."""
    for dtype in capabilities.compute_dtypes:
        for scheme in WeightScheme:
            if scheme in capabilities.schemes:
                form = FORMS[scheme][-1 if scheme is WeightScheme.NVFP4 else 0]
                yield ExpertCase(w13=form, w2=form, dtype=dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer as a backend and the reference prepared it.

    Args:
        case: what it is.
        method: how its experts are run.
        own: experts on the backend's device, prepared by it.
        stored: unprepared, on the CPU.
        reference: prepared by the reference, on the CPU.
        arrivals: a decision for each format and mode in which rows arrive.
    """

    case: ExpertCase
    method: ExpertMethod
    own: ExpertWeights
    stored: ExpertWeights
    reference: ExpertWeights
    arrivals: tuple[DispatchDecision, ...]

    def expected(self, subject: Subject, tokens: DispatchedTokens) -> torch.Tensor:
        """The reference's results of rows of some expert, one after the other."""
        found = subject.reference.quantized_moe_apply(tokens, self.reference, self.case.dtype)
        return found[defined_rows(tokens)]

    def found(self, subject: Subject, tokens: DispatchedTokens) -> torch.Tensor:
        """The backend's, of tokens on the CPU."""
        own_tokens = subject.there(tokens)
        found = subject.ops.quantized_moe_apply(own_tokens, self.own, self.case.dtype)
        require_result(found, own_tokens, self.case)
        return found.cpu()[defined_rows(tokens)]


def require_result(found: object, tokens: DispatchedTokens, case: ExpertCase) -> None:
    """Rows in the layout of those that came.

    Raises:
        FaultError: another shape, which cannot be compared.
    """
    shape = (*tokens.rows.shape[:-1], case.hidden)
    if not isinstance(found, torch.Tensor) or tuple(found.shape) != shape:
        shown = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise FaultError(f"quantized_moe_apply returned {shown}, not {list(shape)}\ncase: {case}")


def layer_of(subject: Subject, case: ExpertCase, seed: int = 0) -> Layer:
    """Prepare a layer.

    Raises:
        NotAskedError: the backend says that it does not serve it.
    """
    support = subject.ops.supports(case.request)
    if not support.ok:
        raise NotAskedError(f"supports() says no: {support.reason}")
    method = support.method or ordinary_method(
        case.w13.scheme, case.dtype, static_input=case.w13.static_input
    )
    arrivals = tuple(decisions(subject.ops, case, method))
    if not arrivals:
        raise NotAskedError(f"none of the formats {', '.join(method.accepted)} is dispatched")
    stored = case.weights(seed)
    return Layer(
        case=case,
        method=method,
        own=prepared(subject, stored, arrivals[0]),
        stored=stored,
        reference=subject.reference.prepare_expert_weights(stored, arrivals[0]),
        arrivals=arrivals,
    )


def prepared(subject: Subject, stored: ExpertWeights, decision: DispatchDecision) -> ExpertWeights:
    """Experts on the backend's device, prepared by it; the given tensors are left alone."""
    own = subject.there(replace(stored, w13=_copied(stored.w13), w2=_copied(stored.w2)))
    return subject.ops.prepare_expert_weights(own, decision)


def _copied(stored: StoredWeight) -> StoredWeight:
    def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.clone()

    return replace(
        stored,
        weight=stored.weight.clone(),
        scale=copy(stored.scale),
        global_scale=copy(stored.global_scale),
        input_scale=copy(stored.input_scale),
        input_offset=copy(stored.input_offset),
    )


def dispatch_request(
    case: ExpertCase,
    method: ExpertMethod,
    mode: DispatchMode,
    override: DispatchDtype | None = None,
) -> DispatchRequest:
    """What is asked for one layer and mode, as the core asks it."""
    wants_nvfp4 = case.w13.scheme is WeightScheme.NVFP4 and case.w13.static_input
    is_fp8 = case.w13.scheme is WeightScheme.FP8_BLOCK
    return DispatchRequest(
        role=ModelRole.MAIN,
        layer=LAYER,
        mode=mode,
        override=None if override is None else Override(value=override, source="the kit"),
        scheme_w13=case.w13.scheme,
        scheme_w2=case.w2.scheme,
        accepted=method.accepted,
        requested_in_mode=method.requested_in_mode.get(mode),
        requested=method.requested,
        input_global_scale=INPUT_GLOBAL_SCALE if wants_nvfp4 else None,
        scale_format=case.w13.scale_format if is_fp8 else None,
        runner=method.runner,
        runner_quantises=method.runner_quantises,
        compute_dtype=case.dtype,
    )


def decisions(ops: Ops, case: ExpertCase, method: ExpertMethod) -> Iterator[DispatchDecision]:
    """One for each different format in which rows may arrive."""
    known: set[DispatchFormat] = set()
    wishes = (None, *(one for one in method.accepted if one in ops.capabilities.dispatch_dtypes))
    for mode in DispatchMode:
        for override in wishes:
            decision = ops.resolve_dispatch_dtype(dispatch_request(case, method, mode, override))
            if decision.format not in known:
                known.add(decision.format)
                yield decision


def draw_tokens(
    counts: Sequence[int],
    hidden: int,
    dtype: torch.dtype,
    format: DispatchFormat,
    *,
    seed: int = 5,
    host_counts: bool = True,
    cumulative: bool = False,
    plain: torch.Tensor | None = None,
) -> DispatchedTokens:
    """Rows in a dispatch format, poison wherever no group has a row, and past the last group."""
    if plain is None:
        plain = draw_rows(sum(counts), hidden, dtype, seed)
    rows, scales = quantise_rows(plain, format)
    counted = torch.tensor(counts, dtype=torch.int64)
    tokens = DispatchedTokens(
        rows=_arranged(rows, counts, format),
        scales=None if scales is None else _arranged(scales, counts, format),
        group_list=counted.cumsum(0) if cumulative else counted,
        group_list_kind=GroupListKind.CUMULATIVE if cumulative else GroupListKind.COUNTS,
        group_counts=tuple(counts) if host_counts else None,
        format=format,
    )
    return poison_undefined_rows(tokens)


def _arranged(rows: torch.Tensor, counts: Sequence[int], format: DispatchFormat) -> torch.Tensor:
    """Rows ``[R, ...]`` where the layout has them; gaps are zero, with rows behind the last."""
    layout = format.row_layout
    if layout is RowLayout.MASKED:
        capacity = max(8, *counts)
        places = torch.cat([torch.arange(n) + i * capacity for i, n in enumerate(counts)])
        flat = _placed(rows, places, len(counts) * capacity)
        return flat.view(len(counts), capacity, *flat.shape[1:])
    alignment = format.alignment if layout is RowLayout.GROUPED_ALIGNED else 1
    starts, end = [], 0
    for count in counts:
        starts.append(end)
        end += -(-count // alignment) * alignment
    places = torch.cat([torch.arange(n) + start for start, n in zip(starts, counts, strict=True)])
    return _placed(rows, places, end + (alignment if alignment > 1 else 3))


def _placed(rows: torch.Tensor, places: torch.Tensor, num_rows: int) -> torch.Tensor:
    as_bytes = rows.unsqueeze(-1).contiguous().view(torch.uint8)
    out = as_bytes.new_zeros(num_rows, *as_bytes.shape[1:])
    out[places] = as_bytes
    return out.view(rows.dtype).squeeze(-1)
