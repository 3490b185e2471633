"""The prompts of one call on their way to completions."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Self

from mortise.engine.events import Completion, Timings, TokenEvent

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from mortise.engine.engine import Engine
    from mortise.engine.logprobs import TokenLogprobs
    from mortise.engine.prompts import Prompt
    from mortise.engine.request import Request
    from mortise.engine.sampling_params import SamplingParams


class Delivery:
    """Steps an engine and hands each token to the generation that waits for it.

    Several generations can be under way at once; whichever is read moves all of them on.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inboxes: dict[int, deque[TokenEvent]] = {}

    def begin(self, request: Request, inbox: deque[TokenEvent]) -> None:
        """Queue a request whose tokens go to ``inbox``."""
        self.engine.add(request)
        self._inboxes[request.id] = inbox

    def end(self, request: Request) -> None:
        """Forget a request; if it is not finished, give it up."""
        self.engine.abort(request)
        del self._inboxes[request.id]

    def step(self) -> None:
        """One step of the engine."""
        for event in self.engine.step():
            self._inboxes[event.request_id].append(event)


class Generation:
    """An iterator over the tokens of several prompts as they come, of all prompts mixed.

    Everything is checked when it is made; nothing runs before it is iterated.

    Args:
        delivery: the engine.
        prompts: what to continue.
        sampling: one for each.

    Raises:
        RequestError: a prompt cannot be served as asked.
        CapacityError: the cache is too small for one of them.
    """

    def __init__(
        self, delivery: Delivery, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams]
    ) -> None:
        self._prompts = list(prompts)
        self._requests = [
            delivery.engine.request(
                prompt.token_ids, params, index, is_plain_text=prompt.is_plain_text
            )
            for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True))
        ]
        self._texts: list[list[str]] = [[] for _ in self._requests]
        self._logprobs: list[list[TokenLogprobs]] = [[] for _ in self._requests]
        self._events = _events(delivery, self._requests)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """What is continued, in order."""
        return tuple(self._prompts)

    @property
    def has_text(self) -> bool:
        """Whether the model has a tokenizer, so that completions have a text."""
        return any(request.text is not None for request in self._requests)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TokenEvent:
        event = next(self._events)
        self._texts[event.index].append(event.text)
        if event.logprobs is not None:
            self._logprobs[event.index].append(event.logprobs)
        return event

    def close(self) -> None:
        """Give up whatever is not finished."""
        self._events.close()

    def completions(self) -> list[Completion]:
        """Run to the end what is not finished; one completion a prompt, in their order."""
        for _ in self:
            pass
        return [self._completion(request) for request in self._requests]

    def _completion(self, request: Request) -> Completion:
        prompt = self._prompts[request.index]
        assert request.finish is not None, "the generation was closed before its end"
        return Completion(
            index=request.index,
            prompt=prompt.text,
            prompt_token_ids=tuple(request.token_ids[: request.num_prompt_tokens]),
            healed_token_id=None if request.healing is None else request.healing.token_id,
            text=None if request.text is None else "".join(self._texts[request.index]),
            token_ids=tuple(request.generated_token_ids),
            finish_reason=request.finish.reason,
            stopped_by=request.finish.stopped_by,
            seed=request.seed,
            logprobs=(
                None if request.params.logprobs is None else tuple(self._logprobs[request.index])
            ),
            timings=Timings.of(request),
            drafting=request.drafting,
        )


def _events(delivery: Delivery, requests: Sequence[Request]) -> Generator[TokenEvent]:
    """The tokens of some requests; whatever ends it gives up those that are not finished.

    It knows nothing of the generation that reads it, so that dropping that ends it at once.
    """
    inbox: deque[TokenEvent] = deque()
    begun: list[Request] = []
    try:
        for request in requests:
            delivery.begin(request, inbox)
            begun.append(request)
        num_unfinished = len(begun)
        while num_unfinished:
            while not inbox:
                delivery.step()
            event = inbox.popleft()
            num_unfinished -= event.finish is not None
            yield event
    finally:
        for request in begun:
            delivery.end(request)
