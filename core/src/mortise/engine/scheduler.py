"""Which requests run in the next step, and which pages of the cache they hold."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from mortise.kv.pages import PAGE_SIZE, PageAllocator, pages_for
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from mortise.engine.request import Request
    from mortise.kv.slots import SlotAllocator


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The work of one step.

    Args:
        mode: of the whole pass; one pass has one mode.
        requests: who takes part, in order of arrival.
        query_lens: new tokens of each, from its first token that is not in the cache.
    """

    mode: ForwardMode
    requests: tuple[Request, ...]
    query_lens: tuple[int, ...]

    def sampled(self) -> list[int]:
        """Places of the requests that get a new token: those whose last token is in this pass."""
        return [
            place
            for place, (request, query_len) in enumerate(
                zip(self.requests, self.query_lens, strict=True)
            )
            if request.num_computed + query_len == len(request.token_ids)
        ]


class Scheduler:
    """Continuous batching with chunked prefill, over pages that are allocated as they are needed.

    A step either reads prompts or gives one token to each running request; where both kinds of
    work wait they take turns, so that neither starves. Requests are admitted in the order they
    came, when the pages for all their tokens so far are free. A running request takes a page when
    its next token needs one; if none is free, the youngest running request gives its pages back
    and is computed again later. The oldest request therefore always goes on, and so each finishes.

    Args:
        allocator: the pages of the cache; its other users must give back what they take.
        slots: for the states of requests that run, one for each.
        max_num_seqs: requests that run at the same time.
        max_num_batched_tokens: tokens of prompts in one step.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        slots: SlotAllocator,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        assert slots.num_slots >= max_num_seqs
        self._allocator = allocator
        self._slots = slots
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
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
        if self._last_mode is ForwardMode.PREFILL:
            batch = self._decode() or self._prefill()
        else:
            batch = self._prefill() or self._decode()
        if batch is not None:
            self._last_mode = batch.mode
        return batch

    def advance(self, batch: Batch) -> None:
        """Note that the tokens of a batch are in the cache."""
        for request, query_len in zip(batch.requests, batch.query_lens, strict=True):
            request.num_computed += query_len

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

    def _decode(self) -> Batch | None:
        for request in tuple(self._running):
            # A request that was preempted for an older one is not running any more.
            if not request.is_prefilling and request in self._running:
                self._make_room(request)
        requests = [request for request in self._running if not request.is_prefilling]
        return _batch(ForwardMode.DECODE, requests, [1] * len(requests))

    def _make_room(self, request: Request) -> None:
        """Give a request the page of its next token, at the cost of the youngest if need be."""
        if pages_for(len(request.token_ids)) <= len(request.pages):
            return
        while self._allocator.num_free == 0:
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is request:
                return
        request.pages.extend(self._allocator.allocate(1))

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
