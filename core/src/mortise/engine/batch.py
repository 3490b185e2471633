"""The work of one step: which requests take part, with which tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.engine.request import Request
    from mortise.spec.roles import ForwardMode


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Requests and the tokens of each that the main model reads next.

    Args:
        mode: of the main model's pass; one pass has one mode.
        requests: who takes part, in order of arrival.
        query_lens: new tokens of each, from its first token that is not in the cache.
        drafts: TARGET_VERIFY: tokens that were drafted for each, which follow its own; else empty.
    """

    mode: ForwardMode
    requests: tuple[Request, ...]
    query_lens: tuple[int, ...]
    drafts: tuple[tuple[int, ...], ...] = ()

    @property
    def context_lens(self) -> tuple[int, ...]:
        """Tokens of each request when the pass is done."""
        pairs = zip(self.requests, self.query_lens, strict=True)
        return tuple(request.num_computed + query_len for request, query_len in pairs)

    def token_ids(self) -> list[int]:
        """The tokens of all rows, request by request."""
        token_ids: list[int] = []
        drafts = self.drafts or ((),) * len(self.requests)
        for request, own, end in zip(self.requests, drafts, self.context_lens, strict=True):
            token_ids += [*request.token_ids[request.num_computed : end], *own]
        return token_ids

    def sampled(self) -> list[int]:
        """Places of the requests that get a new token: those whose last token is in this pass."""
        return [
            place
            for place, (request, end) in enumerate(
                zip(self.requests, self.context_lens, strict=True)
            )
            if end >= len(request.token_ids)
        ]

    def last_rows(self, places: Sequence[int]) -> list[int]:
        """The row of the last token of some requests."""
        ends = tuple(accumulate(self.query_lens))
        return [ends[place] - 1 for place in places]
