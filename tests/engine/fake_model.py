"""A model without weights whose next token depends on every cached token before it.

It keeps token ids in the pages that it is given and reads them back through the page table, so a
page that is lost, shared or left in the wrong order changes what is generated. It also keeps the
tokens of each request in the slot that it is given, as a recurrent layer does what it remembers,
and compares. ``expected_tokens`` says what must come out, without pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from mortise.config import CacheConfig, EngineConfig, SchedulerConfig
from mortise.engine.engine import Engine
from mortise.kv.pages import PAGE_SIZE
from mortise.models.family import ModelFacts
from mortise.parallel.group import ExpertParallelGroup
from mortise.spec.dispatch import DispatchMode
from mortise.spec.roles import ForwardMode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mortise.layers.paged_attention import BatchLayout

VOCABULARY = 97
CPU = torch.device("cpu")


def next_token(token_ids: Sequence[int]) -> int:
    """Of a sequence of tokens; their order matters."""
    value = 7
    for token_id in token_ids:
        value = (value * 31 + token_id + 1) % 1_000_003
    return value % VOCABULARY


def expected_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """What the engine must generate."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass
class FakePool:
    """Pages of token ids; -1 where nothing was written. The tokens so far of each slot."""

    num_pages: int
    num_bytes: int = 0

    def __post_init__(self) -> None:
        self.rows = torch.full((self.num_pages * PAGE_SIZE,), -1)
        self.slots: dict[int, list[int]] = {}


@dataclass
class FakePass:
    pool: FakePool
    layout: BatchLayout

    @property
    def positions(self) -> torch.Tensor:
        return self.layout.positions()


class FakeModel:
    """A ``CausalLM``; ``batches`` records the layout of every pass."""

    def __init__(self) -> None:
        self.batches: list[BatchLayout] = []

    def finish_loading(self) -> dict:
        return {}

    def new_pool(
        self, num_pages: int, dtype: torch.dtype, device: torch.device, num_slots: int = 0
    ) -> FakePool:
        return FakePool(num_pages)

    def new_pass(self, pool: FakePool, layout: BatchLayout) -> FakePass:
        self.batches.append(layout)
        if layout.mode is ForwardMode.DECODE:
            assert set(layout.query_lens) == {1}
        return FakePass(pool, layout)

    def run(self, token_ids_T: torch.Tensor, paged_pass: FakePass) -> torch.Tensor:
        """The next token of each row, ``[T, 1]``."""
        layout, rows = paged_pass.layout, paged_pass.pool.rows
        assert len(token_ids_T) == sum(layout.query_lens)
        starts = [0, *torch.tensor(layout.query_lens).cumsum(0).tolist()]
        for request, (query_len, context) in enumerate(
            zip(layout.query_lens, layout.context_lens, strict=True)
        ):
            slots = self._slots(layout, request, range(context - query_len, context))
            rows[slots] = token_ids_T[starts[request] : starts[request + 1]]
            self._remember(paged_pass.pool, layout, request, rows[slots].tolist())
        answers = []
        for request, (query_len, context) in enumerate(
            zip(layout.query_lens, layout.context_lens, strict=True)
        ):
            seen = rows[self._slots(layout, request, range(context))].tolist()
            assert -1 not in seen, "a row was read before it was written"
            assert seen == paged_pass.pool.slots[layout.state_slots[request]]
            answers += [
                next_token(seen[: position + 1]) for position in range(context - query_len, context)
            ]
        return torch.tensor(answers).unsqueeze(1)

    @staticmethod
    def _remember(pool: FakePool, layout: BatchLayout, request: int, new: list[int]) -> None:
        """Add new tokens to those of a request's slot; the first ones begin it."""
        assert len(set(layout.state_slots)) == len(layout.query_lens), "a slot is shared or missing"
        slot = layout.state_slots[request]
        begins = layout.context_lens[request] == len(new)
        pool.slots[slot] = new if begins else [*pool.slots[slot], *new]

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(hidden_TH.squeeze(1), VOCABULARY).float()

    @staticmethod
    def _slots(layout: BatchLayout, request: int, positions: range) -> torch.Tensor:
        at = torch.tensor(list(positions))
        return layout.page_table[request][at // PAGE_SIZE].long() * PAGE_SIZE + at % PAGE_SIZE


def fake_engine(
    *,
    num_pages: int = 16,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 64,
    context: int = 100_000,
    eos_token_ids: tuple[int, ...] = (),
) -> tuple[Engine, FakeModel]:
    """An engine over a :class:`FakeModel`."""
    model = FakeModel()
    loaded = SimpleNamespace(
        model=model,
        pool=model.new_pool(num_pages, torch.float32, CPU),
        device=CPU,
        threads=None,
        draft=None,
        group=ExpertParallelGroup(),
        modes=(DispatchMode.NORMAL,),
        facts=ModelFacts(
            architecture="fake",
            vocab_size=VOCABULARY,
            max_position_embeddings=context,
            eos_token_ids=eos_token_ids,
            dtype=None,
        ),
        directory=SimpleNamespace(eos_token_ids=eos_token_ids),
    )
    config = EngineConfig(
        cache=CacheConfig(num_pages=num_pages),
        scheduler=SchedulerConfig(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        ),
    )
    return Engine(loaded, None, config), model
