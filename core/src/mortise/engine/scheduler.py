"""Which requests run in the next step, and which pages of the cache they hold."""

from __future__ import annotations

from collections import deque
from itertools import count
from typing import TYPE_CHECKING, Final

from mortise.engine.batch import Batch
from mortise.kv.pages import PAGE_SIZE, PageAllocator, pages_for
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from mortise.engine.request import Request
    from mortise.kv.slots import SlotAllocator


TURNS: Final = (ForwardMode.PREFILL, ForwardMode.TARGET_VERIFY, ForwardMode.DECODE)
"""Kinds of work, each of which is next after the one before it."""


class Scheduler:
    """Continuous batching with chunked prefill, over pages that are allocated as they are needed.

    A step reads prompts, or drafts and verifies several tokens of each running request that is
    drafted for, or gives one token to each of the others; where several kinds of work wait they
    take turns, so that none starves. Requests are admitted in the order they
    came, when the pages for all their tokens so far are free. A running request takes a page when
    its next tokens need one; if none is free, the youngest running request gives its pages back
    and is computed again later. The oldest request therefore always goes on, and so each finishes.

    Args:
        allocator: the pages of the cache; its other users must give back what they take.
        slots: for the states of requests that run, one for each.
        max_num_seqs: requests that run at the same time.
        max_num_batched_tokens: tokens of prompts in one step.
        num_draft_tokens: tokens drafted for a request in one step; 0 drafts none.
        context: positions that the model knows.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        slots: SlotAllocator,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_draft_tokens: int,
        context: int,
    ) -> None:
        assert slots.num_slots >= max_num_seqs
        self._allocator = allocator
        self._slots = slots
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._num_draft_tokens = num_draft_tokens
        # What a request can reach when it runs alone.
        self._most_tokens = min(context, allocator.num_pages * PAGE_SIZE)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._last_mode = ForwardMode.DECODE
        self._arrivals = count()

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that hold none."""
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Queue a request, which must fit into the cache when it runs alone."""
        request.arrival = next(self._arrivals)
        self._waiting.append(request)

    def schedule(self) -> Batch | None:
        """Choose the work of the next step and allocate its pages; None when there is none."""
        self._admit()
        turn = TURNS.index(self._last_mode) + 1
        for mode in (*TURNS[turn:], *TURNS[:turn]):
            batch = self._prefill() if mode is ForwardMode.PREFILL else self._generate(mode)
            if batch is not None:
                self._last_mode = mode
                return batch
        return None

    def start_over(self) -> None:
        """After a step that failed: compute every running request again, from its tokens."""
        for request in reversed(tuple(self._running)):
            self._preempt(request)

    def remove(self, request: Request) -> None:
        """Let go of a request that is finished or given up."""
        if request in self._running:
            self._let_go(request)
            request.pages = []
            request.state_slot = None
        else:
            self._waiting.remove(request)

    def check_integrity(self) -> None:
        """Assert what holds between any two steps, provided that nobody else holds pages."""
        self._allocator.check_integrity([request.pages for request in self._running])
        self._slots.check_integrity([slot_of(request) for request in self._running])
        assert not any(request.pages for request in self._waiting), "a waiting request holds pages"
        assert all(request.state_slot is None for request in self._waiting)
        assert len(self._running) <= self._max_num_seqs, "too many requests run"
        for request in self._running:
            assert request.num_computed <= len(request.pages) * PAGE_SIZE, f"{request} lacks pages"
        order = [request.arrival for request in (*self._running, *self._waiting)]
        assert order == sorted(order), "a request overtook another"

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_num_seqs:
            needed = pages_for(len(self._waiting[0].token_ids))
            # A page in reserve for each running request, lest the newcomer be thrown out at once.
            if needed + len(self._running) > self._allocator.num_free:
                return
            request = self._waiting.popleft()
            request.pages = self._allocator.allocate(needed)
            request.state_slot = self._slots.allocate()
            self._running.append(request)

    def _prefill(self) -> Batch | None:
        left = self._max_num_batched_tokens
        requests, query_lens = [], []
        for request in self._running:
            if request.is_prefilling and left:
                query_len = min(left, request.prefill_target - request.num_computed)
                requests.append(request)
                query_lens.append(query_len)
                left -= query_len
        return _batch(ForwardMode.PREFILL, requests, query_lens)

    def _generate(self, mode: ForwardMode) -> Batch | None:
        """New tokens for the running requests that are drafted for, or for those that are not."""
        is_drafted = mode is ForwardMode.TARGET_VERIFY
        num_drafts = self._num_draft_tokens if is_drafted else 0
        for request in tuple(self._running):
            # A request that was preempted for an older one is not running any more.
            if self._generates(request, is_drafted) and request in self._running:
                self._make_room(request, num_drafts)
        requests = [request for request in self._running if self._generates(request, is_drafted)]
        return _batch(mode, requests, [1 + num_drafts] * len(requests))

    def _generates(self, request: Request, is_drafted: bool) -> bool:
        """Whether a request wants new tokens, with drafts or without."""
        if request.is_prefilling:
            return False
        has_room = len(request.token_ids) + self._num_draft_tokens <= self._most_tokens
        return is_drafted is (request.draft_hidden is not None and has_room)

    def _make_room(self, request: Request, num_drafts: int) -> None:
        """Give a request the pages of its next tokens, at the cost of the youngest if need be."""
        needed = pages_for(len(request.token_ids) + num_drafts) - len(request.pages)
        if needed <= 0:
            return
        while self._allocator.num_free < needed:
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is request:
                return
        request.pages.extend(self._allocator.allocate(needed))

    def _preempt(self, request: Request) -> None:
        self._let_go(request)
        request.restart()
        self._waiting.appendleft(request)

    def _let_go(self, request: Request) -> None:
        self._running.remove(request)
        self._allocator.release(request.pages)
        self._slots.release(slot_of(request))


def slot_of(request: Request) -> int:
    """The slot of a request that runs."""
    assert request.state_slot is not None, f"{request} does not run"
    return request.state_slot


def _batch(mode: ForwardMode, requests: list[Request], query_lens: list[int]) -> Batch | None:
    if not requests:
        return None
    return Batch(mode=mode, requests=tuple(requests), query_lens=tuple(query_lens))
