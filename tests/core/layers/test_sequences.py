"""Whatever the lengths: every token is in one chunk, and sees its own sequence's tokens alone."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fixtures.paged_models import CPU

from mortise.layers.sequences import CHUNK_SIZE, Sequences

lengths = st.lists(st.integers(0, 3 * CHUNK_SIZE), max_size=5)


@given(lens=lengths, width=st.integers(1, 5))
def test_windows_are_the_newest_tokens_of_the_same_sequence(lens: list[int], width: int) -> None:
    sequences = Sequences(lens, width, CPU)
    kept = width - 1
    # (sequence, position), positions before the new tokens being negative.
    before = [(number, place - kept) for number in range(len(lens)) for place in range(kept)]
    new = [(number, place) for number, length in enumerate(lens) for place in range(length)]
    everything = before + new
    assert sequences.window_TW.shape == (len(new), width)
    for (number, place), window in zip(new, sequences.window_TW.tolist(), strict=True):
        seen = [everything[row] for row in window]
        assert seen == [(number, place - kept + tap) for tap in range(width)]
    assert sequences.newest_BR.shape == (len(lens), kept)
    for number, newest in enumerate(sequences.newest_BR.tolist()):
        length = lens[number]
        assert [everything[row] for row in newest] == [
            (number, length - kept + tap) for tap in range(kept)
        ]


@given(lens=lengths)
def test_every_token_is_read_once_and_in_order(lens: list[int]) -> None:
    sequences = Sequences(lens, 4, CPU)
    ends = torch.tensor([0, *lens]).cumsum(0).tolist()
    read: dict[int, list[int]] = {number: [] for number in range(len(lens))}
    for chunk in sequences.chunks:
        assert chunk.reads.shape[1] <= CHUNK_SIZE
        assert chunk.present.any(dim=1).all()
        for place, number in enumerate(chunk.sequences.tolist()):
            present = chunk.present[place]
            read[number] += chunk.reads[place][present].tolist()
            assert torch.equal(chunk.writes[place][present], chunk.reads[place][present])
            assert (chunk.writes[place][~present] == sum(lens)).all()
            # What is not there repeats a token of the same sequence.
            assert (chunk.reads[place] >= ends[number]).all()
            assert (chunk.reads[place] < ends[number + 1]).all()
    for number in range(len(lens)):
        assert read[number] == list(range(ends[number], ends[number + 1]))
