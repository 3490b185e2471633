"""The passes of one step, which change no request: what comes of them is noted afterwards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mortise.engine.logprobs import logprobs_of
from mortise.engine.sampler import sample
from mortise.engine.speculative.acceptance import accept
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    import torch

    from mortise.engine.batch import Batch
    from mortise.engine.lockstep import StepPlan
    from mortise.engine.logprobs import TokenLogprobs
    from mortise.engine.request import Request
    from mortise.engine.runner import Runner
    from mortise.engine.speculative.drafter import Drafter


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a step brings one request.

    Args:
        request: whose it is.
        num_computed: its tokens that are in the cache now.
        token_ids: new ones; none while its prompt is read.
        logprobs: one for each, None where they were not asked for.
        draft_hidden: where its next drafts begin; None where it is not drafted for.
        num_drafted: tokens that were drafted and verified.
    """

    request: Request
    num_computed: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    draft_hidden: torch.Tensor | None = None
    num_drafted: int = 0


class Stepper:
    """Runs the passes of the main model and of the draft in their order.

    Ranks that share experts run the same passes, with no token where they have no work of a kind:
    drafts if any rank drafts, the main model, and the draft over what was read.

    Args:
        runner: of the main model.
        drafter: of the draft; None where nothing drafts.
    """

    def __init__(self, runner: Runner, drafter: Drafter | None) -> None:
        self._runner = runner
        self._drafter = drafter

    def run(self, batch: Batch, plan: StepPlan) -> list[Progress]:
        """All passes of a step with work; the cache is changed, and random numbers are taken."""
        if batch.mode is ForwardMode.TARGET_VERIFY:
            return self._verify(batch, plan)
        return self._read(batch, plan)

    def idle(self, plan: StepPlan) -> None:
        """Take part in a step of other ranks, without work of one's own."""
        mode = plan.dispatch_mode
        if plan.drafts and self._drafter is not None:
            self._drafter.idle_proposals(mode)
        self._runner.idle(mode)
        if plan.extends and self._drafter is not None:
            self._drafter.idle(mode)

    def _read(self, batch: Batch, plan: StepPlan) -> list[Progress]:
        """PREFILL and DECODE: one new token for each request whose tokens are all read."""
        drafter, mode = self._drafter, plan.dispatch_mode
        if plan.drafts and drafter is not None:
            drafter.idle_proposals(mode)
        output = self._runner.run(batch, mode)
        places = batch.sampled()
        requests = [batch.requests[place] for place in places]
        newest: list[int | None] = [None] * len(batch.requests)
        logprobs: list[TokenLogprobs | None] = [None] * len(batch.requests)
        if places:
            logits_BV = self._runner.logits(output.hidden_TH, batch.last_rows(places))
            token_ids = sample(logits_BV, requests)
            values = logprobs_of(logits_BV, token_ids, requests)
            for place, token_id, logprob in zip(places, token_ids, values, strict=True):
                newest[place], logprobs[place] = token_id, logprob
        starts: list[torch.Tensor | None] = [None] * len(batch.requests)
        if plan.extends and drafter is not None:
            if batch.mode is ForwardMode.PREFILL:
                starts = drafter.read(batch, output.hidden_TH, newest, mode)
            else:
                drafter.idle(mode)
        return [
            Progress(
                request=request,
                num_computed=end,
                token_ids=() if token_id is None else (token_id,),
                logprobs=() if token_id is None else (logprob,),
                draft_hidden=start,
            )
            for request, end, token_id, logprob, start in zip(
                batch.requests, batch.context_lens, newest, logprobs, starts, strict=True
            )
        ]

    def _verify(self, batch: Batch, plan: StepPlan) -> list[Progress]:
        """TARGET_VERIFY: draft, verify, accept, and read what was accepted."""
        drafter, mode, requests = self._drafter, plan.dispatch_mode, batch.requests
        assert drafter is not None
        proposals = drafter.propose(requests, mode)
        batch = replace(batch, drafts=tuple(proposal.token_ids for proposal in proposals))
        output = self._runner.run(batch, mode)
        logits_TV = self._runner.logits(output.hidden_TH)
        logits_BJV = logits_TV.unflatten(0, (len(requests), drafter.num_tokens + 1))
        accepted = accept(logits_BJV, proposals, requests)
        logprobs = self._logprobs(logits_BJV, accepted, requests)
        starts = drafter.extend(batch, output.hidden_TH, accepted, mode)
        # Last, since nothing can be taken back: a pass that was not accepted has moved no state.
        output.paged_pass.accept([len(new) for new in accepted])
        return [
            Progress(
                request=request,
                num_computed=request.num_computed + len(new),
                token_ids=tuple(new),
                logprobs=own,
                draft_hidden=start,
                num_drafted=drafter.num_tokens,
            )
            for request, new, own, start in zip(requests, accepted, logprobs, starts, strict=True)
        ]

    def _logprobs(
        self,
        logits_BJV: torch.Tensor,
        accepted: list[list[int]],
        requests: tuple[Request, ...],
    ) -> list[tuple[TokenLogprobs | None, ...]]:
        return [
            tuple(logprobs_of(logits_JV[: len(new)], new, [request] * len(new)))
            for logits_JV, new, request in zip(logits_BJV, accepted, requests, strict=True)
        ]
