"""A backend that is right, and what an author might get wrong in it, one thing at a time."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import dedent, indent

from mortise.plugin import HOOKS

MANIFEST = {
    "implements": {name: spec.version for name, spec in HOOKS.items()},
    "capabilities": {
        "schemes": ["float", "w8a8", "w4a16"],
        "dispatch_dtypes": ["fp32", "bf16", "int8"],
        "compute_dtypes": ["bfloat16", "float32"],
        "page_sizes": [64],
    },
}

CODE = '''\
"""A backend made for a test: the reference, of fewer schemes."""

import torch
from dataclasses import replace

from mortise.plugin import *
from mortise.formats.weights import quantise_weight
from mortise.reference import attention, dispatch, moe, projections, qkv
from mortise.reference.backend import ReferenceBackend

SCHEMES = frozenset({WeightScheme.FLOAT, WeightScheme.W8A8, WeightScheme.W4A16})


class FakeBackend(ReferenceBackend):
    """Right, unless something stands below."""

    def capabilities(self):
        return replace(
            super().capabilities(),
            schemes=SCHEMES,
            compute_dtypes=(torch.bfloat16, torch.float32),
            dispatch_dtypes=frozenset(
                {DispatchDtype.FP32, DispatchDtype.BF16, DispatchDtype.INT8}
            ),
        )

    def supports(self, request):
        if {request.scheme_w13, request.scheme_w2} <= SCHEMES:
            return super().supports(request)
        return Support(ok=False, reason="only float, w8a8 and w4a16 are served")

    def supports_linear(self, request):
        if request.scheme in SCHEMES:
            return super().supports_linear(request)
        return Support(ok=False, reason=f"its weight is stored as {request.scheme.value}")
'''


@dataclass(frozen=True)
class Mistake:
    """One mistake and what the kit must say of it.

    Args:
        name: of the mistake.
        check: the check that finds it.
        words: in its message.
        methods: methods in place of those of the right backend.
        before: statements before the class.
    """

    name: str
    check: str
    words: tuple[str, ...]
    methods: str = ""
    before: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def code(self) -> str:
        """Source of the module."""
        own = indent(dedent(self.methods), "    ")
        head, separator, tail = CODE.partition("\n\nclass FakeBackend")
        return f"{head}\n{dedent(self.before)}{separator}{tail}\n{own}"


MISTAKES = (
    Mistake(
        "swapped scales",
        "experts-match-the-reference",
        ("quantized_moe_apply of w8a8", "scales of gate and up are swapped"),
        """
        @hookimpl
        def prepare_expert_weights(self, experts, decision):
            w13 = experts.w13
            if w13.scale is not None:
                gate, up = w13.scale.chunk(2, dim=1)
                w13 = replace(w13, scale=torch.cat([up, gate], dim=1))
            return moe.prepare_expert_weights(replace(experts, w13=w13), decision)
        """,
    ),
    Mistake(
        "gate for up",
        "experts-match-the-reference",
        ("quantized_moe_apply of float", "gate and up are swapped"),
        """
        @hookimpl
        def quantized_moe_apply(self, tokens, experts, out_dtype):
            if experts.w13.scheme is WeightScheme.FLOAT:
                gate, up = experts.w13.weight.chunk(2, dim=1)
                w13 = replace(experts.w13, weight=torch.cat([up, gate], dim=1))
                experts = replace(experts, w13=w13)
            return moe.quantized_moe_apply(tokens, experts, out_dtype)
        """,
    ),
    Mistake(
        "off-by-one page",
        "scores-match-the-reference",
        ("paged_mqa_logits", "wrong page: off by one"),
        """
        @hookimpl
        def paged_mqa_logits(self, query, key_pages, weights, page_table, metadata):
            table = page_table.roll(1, dims=1)
            return attention.paged_mqa_logits(query, key_pages, weights, table, metadata)
        """,
    ),
    Mistake(
        "dropped last token",
        "experts-match-the-reference",
        ("quantized_moe_apply", "the last token of each group is missing"),
        """
        @hookimpl
        def quantized_moe_apply(self, tokens, experts, out_dtype):
            result = moe.quantized_moe_apply(tokens, experts, out_dtype)
            counts = tokens.group_list
            if tokens.group_list_kind is GroupListKind.CUMULATIVE:
                counts = counts.diff(prepend=counts.new_zeros(1))
            end = 0
            for expert, count in enumerate(counts.tolist()):
                end += count
                if count and result.dim() == 2:
                    result[end - 1] = 0
                elif count:
                    result[expert, count - 1] = 0
            return result
        """,
    ),
    Mistake(
        "wrong nibble order",
        "projections-match-the-reference",
        ("quantized_linear of w4a16", "nibbles are read in the wrong order"),
        """
        @hookimpl
        def prepare_linear_weight(self, linear):
            stored = linear.stored
            if stored.scheme is WeightScheme.W4A16:
                values = stored.weight.numpy().view("uint32")
                turned = sum(((values >> (4 * i)) & 15) << (28 - 4 * i) for i in range(8))
                stored = replace(stored, weight=torch.from_numpy(turned.view("int32")))
            return projections.prepare_linear_weight(replace(linear, stored=stored))
        """,
    ),
    Mistake(
        "late None",
        "projections-match-the-reference",
        ("hook quantized_linear returned None",),
        """
        @hookimpl
        def quantized_linear(self, rows, linear, out_dtype):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 7:
                return None
            return projections.quantized_linear(rows, linear, out_dtype)
        """,
    ),
    Mistake(
        "process-wide state in use",
        "interleaved-roles-give-what-each-gives-alone",
        ("process-wide state", "two models in turns differ"),
        """
        @hookimpl
        def prepare_expert_weights(self, experts, decision):
            LAST["experts"] = moe.prepare_expert_weights(experts, decision)
            return LAST["experts"]

        @hookimpl
        def quantized_moe_apply(self, tokens, experts, out_dtype):
            last = LAST["experts"]
            same = last.hidden_size == experts.hidden_size and last.w13.scheme is experts.w13.scheme
            scale = 1.0 if same else 2.0
            return moe.quantized_moe_apply(tokens, experts, out_dtype) * scale
        """,
        before="LAST = {}",
    ),
    Mistake(
        "process-wide state at rest",
        "it-keeps-nothing-in-its-modules",
        ("process-wide state", "fake_broken.backend.CACHE"),
        """
        @hookimpl
        def qkv_split(self, projected_qkvz, projected_ba, shape):
            CACHE[str(shape)] = len(projected_ba)
            return qkv.qkv_split(projected_qkvz, projected_ba, shape)
        """,
        before="CACHE = {}",
    ),
    Mistake(
        "wrong dtype",
        "experts-answer-in-the-dtype-asked-for",
        ("wrong dtype", "torch.float32"),
        """
        @hookimpl
        def quantized_moe_apply(self, tokens, experts, out_dtype):
            return moe.quantized_moe_apply(tokens, experts, out_dtype).float()
        """,
    ),
    Mistake(
        "silent copy",
        "kernels-stay-on-their-device",
        ("silently copies to another device", "to meta"),
        """
        @hookimpl
        def quantized_moe_apply(self, tokens, experts, out_dtype):
            tokens.rows.to("meta")
            return moe.quantized_moe_apply(tokens, experts, out_dtype)
        """,
    ),
    Mistake(
        "stale schedule",
        "stale-schedules-are-refused",
        ("took a stale schedule", "paged_mqa_logits"),
        """
        @hookimpl
        def paged_mqa_logits(self, query, key_pages, weights, page_table, metadata):
            metadata = replace(metadata, generation=metadata.buffers.generation)
            return attention.paged_mqa_logits(query, key_pages, weights, page_table, metadata)
        """,
    ),
    Mistake(
        "read past the last group",
        "experts-read-no-undefined-row",
        ("reads past the last group",),
        """
        @hookimpl
        def quantized_moe_apply(self, tokens, experts, out_dtype):
            result = moe.quantized_moe_apply(tokens, experts, out_dtype)
            return result + 0 * tokens.rows.float().sum().to(out_dtype)
        """,
    ),
    Mistake(
        "unsorted group list",
        "rows-reach-the-experts-that-were-chosen",
        ("the group list is unsorted",),
        """
        @hookimpl
        def create_token_dispatcher(self, request):
            return Unsorted(request.num_experts)
        """,
        before="""
        class Unsorted(dispatch.LocalDispatcher):
            __slots__ = ()

            def dispatch(self, hidden_TH, routing, format):
                tokens, handle = super().dispatch(hidden_TH, routing, format)
                counts = tokens.group_counts
                return replace(
                    tokens,
                    group_list=tokens.group_list.flip(0),
                    group_counts=None if counts is None else counts[::-1],
                ), handle
        """,
    ),
    Mistake(
        "aliasing",
        "splits-have-memory-of-their-own",
        ("aliasing", "shares the memory of its argument projected_ba"),
        """
        @hookimpl
        def qkv_split(self, projected_qkvz, projected_ba, shape):
            parts = qkv.qkv_split(projected_qkvz, projected_ba, shape)
            if len(projected_ba) == 1 and shape.layout is QKVLayout.CONTIGUOUS:
                return replace(parts, b=projected_ba[:, : shape.num_value_heads])
            return parts
        """,
    ),
    Mistake(
        "writing into rows",
        "experts-leave-their-arguments-alone",
        ("wrote into its argument tokens.rows",),
        """
        @hookimpl
        def quantized_moe_apply(self, tokens, experts, out_dtype):
            result = moe.quantized_moe_apply(tokens, experts, out_dtype)
            if tokens.rows.dtype is result.dtype:
                return tokens.rows.copy_(result)
            return result
        """,
    ),
    Mistake(
        "mutation of the core at import",
        "importing-it-changes-nothing",
        ("mutates the core", "mortise.formats.integer.quantise_int_rows was replaced"),
        before="""
        from mortise.formats import integer

        _own = integer.quantise_int_rows
        integer.quantise_int_rows = lambda rows, bits: _own(rows, bits)
        """,
    ),
    Mistake(
        "a vendor's library at the top",
        "it-imports-without-a-device",
        ("No module named 'library_of_a_vendor'", "import the vendor's libraries in create"),
        before="import library_of_a_vendor",
    ),
    Mistake(
        "mutation of the core in use",
        "using-it-changes-nothing-of-the-core",
        ("mutates the core", "LocalDispatcher.combine was replaced"),
        """
        @hookimpl
        def qkv_split(self, projected_qkvz, projected_ba, shape):
            own = dispatch.LocalDispatcher.combine
            dispatch.LocalDispatcher.combine = lambda self, rows, handle: own(self, rows, handle)
            return qkv.qkv_split(projected_qkvz, projected_ba, shape)
        """,
    ),
    Mistake(
        "environment variable",
        "it-writes-no-environment-variable",
        ("environment variables are written: FAKE_CHIP_MODE",),
        """
        @hookimpl
        def qkv_split(self, projected_qkvz, projected_ba, shape):
            import os

            os.environ["FAKE_CHIP_MODE"] = "1"
            del os.environ["FAKE_CHIP_MODE"]
            return qkv.qkv_split(projected_qkvz, projected_ba, shape)
        """,
    ),
    Mistake(
        "a registry of bindings",
        "a-released-binding-is-forgotten",
        ("process-wide state: a released binding is kept alive",),
        """
        @classmethod
        def create(cls, context):
            made = super().create(context)
            MADE.append(made)
            return made
        """,
        before="MADE = []",
    ),
    Mistake(
        "options in silence",
        "unknown-options-are-refused",
        ("an unknown option is taken in silence",),
        """
        @classmethod
        def create(cls, context):
            return super().create(replace(context, options={}))
        """,
    ),
    Mistake(
        "old weights after an update",
        "experts-are-prepared-again-after-a-weight-update",
        ("keeps the old weights after a weight update",),
        """
        @hookimpl
        def prepare_expert_weights(self, experts, decision):
            if experts.prepared is not None:
                return experts
            return replace(
                moe.prepare_expert_weights(experts, decision),
                prepared=(experts.w13, experts.w2),
            )

        @hookimpl
        def quantized_moe_apply(self, tokens, experts, out_dtype):
            w13, w2 = experts.prepared
            experts = replace(experts, w13=w13, w2=w2, prepared=None)
            return moe.quantized_moe_apply(tokens, experts, out_dtype)
        """,
    ),
    Mistake(
        "a decision that remembers",
        "decisions-are-the-same-every-time",
        ("resolve_dispatch_dtype depends on more than its request",),
        """
        @hookimpl
        def resolve_dispatch_dtype(self, request):
            if request.override is not None:
                self.last = request.override
            return dispatch.resolve_dispatch_dtype(
                replace(request, override=getattr(self, "last", None))
            )
        """,
    ),
    Mistake(
        "an override passed over",
        "decisions-follow-the-order-of-authority",
        ("passes over the user's override",),
        """
        @hookimpl
        def resolve_dispatch_dtype(self, request):
            return dispatch.resolve_dispatch_dtype(replace(request, override=None))
        """,
    ),
    Mistake(
        "state on the dispatcher",
        "dispatches-do-not-mix",
        ("combine after another dispatch",),
        """
        @hookimpl
        def create_token_dispatcher(self, request):
            return Forgetful(request.num_experts)
        """,
        before="""
        class Forgetful(dispatch.LocalDispatcher):
            __slots__ = ("weights",)

            def dispatch(self, hidden_TH, routing, format):
                self.weights = routing.topk_weights
                return super().dispatch(hidden_TH, routing, format)

            def combine(self, rows_RH, handle):
                weights = handle.routing_weights.clone()
                count = min(len(weights), len(self.weights))
                weights[:count] *= self.weights[:count] / handle.routing_weights[:count].clamp(
                    min=0.1
                )
                return super().combine(rows_RH, replace(handle, routing_weights=weights))
        """,
    ),
    Mistake(
        "a unit of work too few",
        "schedules-cover-each-unit-once",
        ("does not cover each (row, unit) exactly once",),
        """
        @hookimpl
        def paged_mqa_metadata(self, context_lens, block_size, num_workers, mode):
            plan = attention.paged_mqa_metadata(context_lens, block_size, num_workers, mode)
            if plan.schedule is not None:
                plan.schedule[-1, 0] -= 1
            return plan
        """,
    ),
    Mistake(
        "lengths of somebody else",
        "plans-own-their-lengths",
        ("aliasing: the plan shares the memory of context_lens",),
        """
        @hookimpl
        def paged_mqa_metadata(self, context_lens, block_size, num_workers, mode):
            plan = attention.paged_mqa_metadata(context_lens, block_size, num_workers, mode)
            plan.buffers.context_lens = context_lens
            return plan
        """,
    ),
    Mistake(
        "a scale for the whole batch",
        "two-batches-give-what-one-gives",
        ("two batches instead of one",),
        """
        @hookimpl
        def quantized_moe_apply(self, tokens, experts, out_dtype):
            result = moe.quantized_moe_apply(tokens, experts, out_dtype)
            return result * (1 + int(tokens.group_list.sum()) / 100)
        """,
    ),
    Mistake(
        "a scheme in the list alone",
        "claimed-schemes-are-served",
        ("capabilities() lists nvfp4, and supports() refuses every layer of it",),
        before="""
        SCHEMES = SCHEMES | {WeightScheme.NVFP4}
        """,
        methods="""
        def supports(self, request):
            if WeightScheme.NVFP4 in {request.scheme_w13, request.scheme_w2}:
                return Support(ok=False, reason="not yet")
            if {request.scheme_w13, request.scheme_w2} <= SCHEMES:
                return ReferenceBackend.supports(self, request)
            return Support(ok=False, reason="other schemes")
        """,
    ),
)
