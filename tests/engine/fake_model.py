"""A model without weights whose next token depends on every cached token before it.

It keeps token ids in the pages that it is given and reads them back through the page table, so a
page that is lost, shared or left in the wrong order changes what is generated. It also keeps the
tokens of each request in the slot that it is given, as a recurrent layer does what it remembers,
and compares. ``expected_tokens`` says what must come out, without pages.

Its hidden state is the number that the tokens so far come to, so a draft can go on from it: the
one here is right, but for numbers that a divisor divides.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from mortise.config import CacheConfig, DraftConfig, EngineConfig, SchedulerConfig
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


START = 7


def further(value: int, token_id: int) -> int:
    """The number of some tokens and one more."""
    return (value * 31 + token_id + 1) % 1_000_003


def number_of(token_ids: Sequence[int]) -> int:
    """Of a sequence of tokens; their order matters."""
    value = START
    for token_id in token_ids:
        value = further(value, token_id)
    return value


def next_token(token_ids: Sequence[int]) -> int:
    """What follows a sequence of tokens."""
    return number_of(token_ids) % VOCABULARY


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

    def __post_init__(self) -> None:
        self.verified: list[list[int]] = []

    @property
    def positions(self) -> torch.Tensor:
        return self.layout.positions()

    def accept(self, num_tokens: Sequence[int]) -> None:
        assert self.layout.mode is ForwardMode.TARGET_VERIFY
        for slot, new, count in zip(
            self.layout.state_slots, self.verified, num_tokens, strict=True
        ):
            assert 1 <= count <= len(new)
            self.pool.slots[slot] += new[:count]
        self.verified = []


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

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        return token_ids_T.unsqueeze(1)

    def run(self, token_ids_T: torch.Tensor, paged_pass: FakePass) -> torch.Tensor:
        """The number of the tokens up to each row, ``[T, 1]``."""
        layout, rows = paged_pass.layout, paged_pass.pool.rows
        assert len(token_ids_T) == sum(layout.query_lens)
        starts = [0, *torch.tensor(layout.query_lens).cumsum(0).tolist()]
        for request, (query_len, context) in enumerate(
            zip(layout.query_lens, layout.context_lens, strict=True)
        ):
            slots = slots_of(layout, request, range(context - query_len, context))
            rows[slots] = token_ids_T[starts[request] : starts[request + 1]]
            self._remember(paged_pass, request, rows[slots].tolist())
        answers = []
        for request, (query_len, context) in enumerate(
            zip(layout.query_lens, layout.context_lens, strict=True)
        ):
            seen = rows[slots_of(layout, request, range(context))].tolist()
            assert -1 not in seen, "a row was read before it was written"
            new = paged_pass.verified[request] if paged_pass.verified else []
            assert seen == [*paged_pass.pool.slots[layout.state_slots[request]], *new]
            answers += [
                number_of(seen[: position + 1]) for position in range(context - query_len, context)
            ]
        return torch.tensor(answers).view(-1, 1)

    @staticmethod
    def _remember(paged_pass: FakePass, request: int, new: list[int]) -> None:
        """Add new tokens to those of a request's slot; the first ones begin it."""
        pool, layout = paged_pass.pool, paged_pass.layout
        assert len(set(layout.state_slots)) == len(layout.query_lens), "a slot is shared or missing"
        if layout.mode is ForwardMode.TARGET_VERIFY:
            paged_pass.verified.append(new)
            return
        slot = layout.state_slots[request]
        begins = layout.context_lens[request] == len(new)
        pool.slots[slot] = new if begins else [*pool.slots[slot], *new]

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(hidden_TH.squeeze(1) % VOCABULARY, VOCABULARY).float()


class FakeDraft(FakeModel):
    """A ``DraftModel``; its cache holds the token after each position, and it compares.

    Args:
        main: pool of the main model, whose first token no row of the draft holds.
        wrong: it is wrong where this divides the right number; 1 is always, 0 never.
    """

    def __init__(self, main: FakePool, wrong: int) -> None:
        super().__init__()
        self._main = main
        self._wrong = wrong

    def run(
        self, embeddings_TH: torch.Tensor, hidden_TH: torch.Tensor, paged_pass: FakePass
    ) -> torch.Tensor:
        """The number of one token more than the hidden states speak of, or a wrong one."""
        layout, rows = paged_pass.layout, paged_pass.pool.rows
        assert embeddings_TH.shape == hidden_TH.shape == (sum(layout.query_lens), 1)
        start = 0
        for request, (query_len, context) in enumerate(
            zip(layout.query_lens, layout.context_lens, strict=True)
        ):
            own = slice(start, start + query_len)
            start += query_len
            first = context - query_len
            slots = slots_of(layout, request, range(first, context))
            rows[slots] = embeddings_TH[own, 0]
            before = rows[slots_of(layout, request, range(context))].tolist()[:first]
            assert -1 not in before, "a row was read before it was written"
            if layout.mode is not ForwardMode.DECODE:
                # The main model's own state: of its first token and of what the rows before hold.
                first_token = int(self._main.rows[slots_of(layout, request, range(1))])
                assert number_of([first_token, *before]) == int(hidden_TH[own.start])
        pairs = zip(hidden_TH[:, 0].tolist(), embeddings_TH[:, 0].tolist(), strict=True)
        right = [further(value, token_id) for value, token_id in pairs]
        is_wrong = [bool(self._wrong) and value % self._wrong == 0 for value in right]
        answers = [value + wrong for value, wrong in zip(right, is_wrong, strict=True)]
        return torch.tensor(answers).view(-1, 1)


def slots_of(layout: BatchLayout, request: int, positions: range) -> torch.Tensor:
    """Rows of the flattened pool of some positions of a request."""
    at = torch.tensor(list(positions), dtype=torch.int64)
    return layout.page_table[request][at // PAGE_SIZE].long() * PAGE_SIZE + at % PAGE_SIZE


def fake_engine(
    *,
    num_pages: int = 16,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 64,
    context: int = 100_000,
    eos_token_ids: tuple[int, ...] = (),
    num_draft_tokens: int = 0,
    wrong: int = 3,
) -> tuple[Engine, FakeModel]:
    """An engine over a :class:`FakeModel`, with a :class:`FakeDraft` if it is to draft."""
    model = FakeModel()
    pool = model.new_pool(num_pages, torch.float32, CPU)
    draft = FakeDraft(pool, wrong)
    loaded = SimpleNamespace(
        model=model,
        pool=pool,
        device=CPU,
        threads=None,
        draft=SimpleNamespace(model=draft, pool=draft.new_pool(num_pages, torch.float32, CPU))
        if num_draft_tokens
        else None,
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
        draft=DraftConfig(num_tokens=num_draft_tokens),
    )
    return Engine(loaded, None, config), model
