"""The loop that turns requests into tokens, one step at a time."""

from __future__ import annotations

import secrets
import time
from itertools import count
from typing import TYPE_CHECKING

from mortise.engine.events import TokenEvent
from mortise.engine.healing import Healing, healing_of
from mortise.engine.limits import check_prompt, new_token_limit, state_slots
from mortise.engine.lockstep import Lockstep
from mortise.engine.request import Finish, FinishReason, Request, finish_of
from mortise.engine.runner import Runner
from mortise.engine.scheduler import Scheduler
from mortise.engine.speculative.drafter import Drafter
from mortise.engine.step import Progress, Stepper
from mortise.engine.text import TextStream
from mortise.errors import ModelConfigError, PromptTooLongError
from mortise.kv.pages import PageAllocator, pages_for
from mortise.kv.slots import SlotAllocator

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from mortise.checkpoint import Tokenizer
    from mortise.config import EngineConfig
    from mortise.engine.loading import LoadedModel
    from mortise.engine.logprobs import TokenLogprobs
    from mortise.engine.sampling_params import SamplingParams


class Engine:
    """Continuous batching over one loaded model; for one thread.

    Args:
        loaded: the model, its cache and its facts.
        tokenizer: makes text of tokens; None where the model has none.
        config: limits of a step.
    """

    def __init__(
        self, loaded: LoadedModel, tokenizer: Tokenizer | None, config: EngineConfig
    ) -> None:
        self._facts = loaded.facts
        # What the directory says, and where it is silent, what the family reads of it.
        self._eos_token_ids = frozenset(
            loaded.directory.eos_token_ids or loaded.facts.eos_token_ids
        )
        self._tokenizer = tokenizer
        self._chunk = config.scheduler.max_num_batched_tokens
        self._num_draft_tokens = config.draft.num_tokens
        self._allocator = PageAllocator(loaded.pool.num_pages)
        self._slots = SlotAllocator(state_slots(config.scheduler))
        self.scheduler = Scheduler(
            self._allocator,
            self._slots,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            num_draft_tokens=self._num_draft_tokens,
            context=loaded.facts.max_position_embeddings,
        )
        self.runner = Runner(loaded.model, loaded.pool, loaded.device, loaded.threads)
        self.drafter = _drafter(loaded, self._num_draft_tokens)
        self._stepper = Stepper(self.runner, self.drafter)
        self._modes = loaded.modes
        self._lockstep = Lockstep(
            loaded.group,
            loaded.modes,
            config.dispatch.max_tokens_per_rank,
            is_drafting=self.drafter is not None,
        )
        self._ids = count()

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished."""
        return self.scheduler.has_work

    def request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        index: int = 0,
        *,
        is_plain_text: bool = False,
    ) -> Request:
        """Check what is asked and make it definite; nothing is queued yet.

        Limits are those of the whole prompt, whether or not its last token is healed.

        Args:
            prompt_token_ids: at least one.
            params: as asked.
            index: place of the prompt in its call.
            is_plain_text: whether the prompt's last token may be healed.

        Raises:
            RequestError: the prompt is empty, holds what is no token, or is too long with the
                tokens asked for; or stop texts are given and there is no tokenizer.
            CapacityError: the cache is too small for it.
        """
        token_ids = list(prompt_token_ids)
        check_prompt(token_ids, self._facts.vocab_size)
        max_new_tokens = new_token_limit(
            num_prompt_tokens=len(token_ids),
            max_tokens=params.max_tokens,
            context=self._facts.max_position_embeddings,
            num_pages=self._allocator.num_pages,
        )
        eos_token_ids = frozenset() if params.ignore_eos else self._eos_token_ids
        stop_token_ids = eos_token_ids.union(params.stop_token_ids)
        healing = None
        if is_plain_text and params.token_healing and self._tokenizer is not None:
            healing = healing_of(token_ids, self._tokenizer, stop_token_ids)
        if healing is not None:
            token_ids.pop()
        return Request(
            id=next(self._ids),
            prompt_token_ids=token_ids,
            params=params,
            max_new_tokens=max_new_tokens,
            seed=secrets.randbits(32) if params.seed is None else params.seed,
            stop_token_ids=stop_token_ids,
            text=self._text_stream(token_ids, params, healing),
            healing=healing,
            index=index,
            num_draft_tokens=self._num_draft_tokens,
        )

    def add(self, request: Request) -> None:
        """Queue a request."""
        request.added_at = time.perf_counter()
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Give up a request, unless it is finished; its pages are free at once."""
        if request.finish is None:
            request.finish = Finish(FinishReason.ABORTED)
            request.finished_at = time.perf_counter()
            self.scheduler.remove(request)

    def step(self) -> list[TokenEvent]:
        """Run the passes of one step; the tokens that came of it, none if it only read prompts.

        If it fails, every running request is as it was before, and is computed again from its
        tokens when the engine goes on.

        Raises:
            RankLostError: another rank died or does not answer.
        """
        batch = self.scheduler.schedule()
        assert batch is not None, "a step without work"
        randoms = [
            (request.random, request.random.getstate())
            for request in batch.requests
            if not request.params.is_greedy
        ]
        try:
            plan = self._lockstep.agree(batch)
            assert plan is not None
            results = self._stepper.run(batch, plan)
        except BaseException:
            for random, state in randoms:
                random.setstate(state)
            self.scheduler.start_over()
            raise
        now = time.perf_counter()
        return [event for progress in results for event in self._collect(progress, now)]

    def follow(self) -> None:
        """Take part in the steps of other ranks, without work of one's own, until all are done.

        Raises:
            RankLostError: another rank died or does not answer.
        """
        assert not self.has_work
        while (plan := self._lockstep.agree(None)) is not None:
            self._stepper.idle(plan)

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """float32 ``[T, vocab]``: what the model expects after each token of one sequence.

        Raises:
            RequestError: the sequence is empty, holds what is no token, or exceeds the context.
            CapacityError: the pages for it are not free.
        """
        token_ids = list(token_ids)
        check_prompt(token_ids, self._facts.vocab_size)
        context = self._facts.max_position_embeddings
        if len(token_ids) > context:
            raise PromptTooLongError(
                f"the sequence has {len(token_ids)} tokens",
                expected=f"at most {context}, the model's context",
                remedy="score it in windows, as `mortise eval` does",
            )
        pages = self._allocator.allocate(pages_for(len(token_ids)))
        try:
            slot = self._slots.allocate()
            try:
                return self.runner.score(token_ids, pages, self._chunk, self._modes[0], slot)
            finally:
                self._slots.release(slot)
        finally:
            self._allocator.release(pages)

    def _collect(self, progress: Progress, now: float) -> Iterator[TokenEvent]:
        """Note what a step brought a request, and let go of it if its last token is there."""
        request = progress.request
        request.num_computed = progress.num_computed
        request.draft_hidden = progress.draft_hidden
        if progress.num_drafted:
            assert request.drafting is not None
            num_accepted = len(progress.token_ids) - 1
            request.drafting = request.drafting.after(progress.num_drafted, num_accepted)
        for token_id, logprobs in zip(progress.token_ids, progress.logprobs, strict=True):
            yield self._token(request, token_id, logprobs, now)
            if request.finish is not None:
                # Tokens that were accepted after the last one are of no use.
                return

    def _token(
        self, request: Request, token_id: int, logprobs: TokenLogprobs | None, now: float
    ) -> TokenEvent:
        """Give a request a token."""
        request.token_ids.append(token_id)
        if request.first_token_at is None:
            request.first_token_at = now
        stream = request.text
        text = ""
        if stream is not None and token_id not in request.stop_token_ids:
            text = stream.push(token_id)
        request.finish = finish_of(request)
        if request.finish is not None:
            request.finished_at = now
            self.scheduler.remove(request)
            text += "" if stream is None else stream.flush()
        return TokenEvent(request.id, request.index, token_id, text, logprobs, request.finish)

    def _text_stream(
        self, token_ids: list[int], params: SamplingParams, healing: Healing | None
    ) -> TextStream | None:
        if self._tokenizer is not None:
            stream = TextStream(self._tokenizer.stream_decoder(), token_ids, params.stop)
            if healing is not None:
                cut = TextStream(self._tokenizer.stream_decoder(), token_ids, ())
                stream.leave_out(len(cut.push(healing.token_id) + cut.flush()))
            return stream
        if params.stop:
            raise ModelConfigError(
                f"stop texts are given ({params.stop!r}), and this model has no tokenizer.json",
                expected="a tokenizer, or stop_token_ids alone",
                remedy="give stop_token_ids, or add tokenizer.json to the model directory",
            )
        return None


def _drafter(loaded: LoadedModel, num_tokens: int) -> Drafter | None:
    if loaded.draft is None:
        return None
    return Drafter(
        loaded.draft.model,
        loaded.draft.pool,
        loaded.model,
        loaded.device,
        num_tokens,
        loaded.threads,
    )
