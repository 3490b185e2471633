"""Tokens that begin alike are found by their bytes, in every kind of vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.core.checkpoint.conftest import BOS, USER
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from mortise.checkpoint import Tokenizer, builtin_model_path

if TYPE_CHECKING:
    from collections.abc import Mapping


def bytes_of(backend: Backend) -> Mapping[int, bytes]:
    """The bytes of every token that was not added, by the table that GPT-2 published."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    added = backend.get_added_tokens_decoder()
    return {
        token_id: bytes(byte_of[letter] for letter in piece)
        for piece, token_id in backend.get_vocab().items()
        if token_id not in added
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_extensions_are_the_tokens_that_begin_with_the_bytes(
    backend: Backend, data: st.DataObject
) -> None:
    table = bytes_of(backend)
    token_id = data.draw(st.sampled_from(sorted(table)))
    found = Tokenizer(backend).extensions(token_id)
    assert found[0] == token_id
    assert set(found) == {one for one in table if table[one].startswith(table[token_id])}
    assert len(set(found)) == len(found)


def test_within_a_character_bytes_are_compared_and_not_letters(backend: Backend) -> None:
    table = bytes_of(backend)
    token_of = {piece: token_id for token_id, piece in table.items()}
    first_byte = "中".encode()[:1]
    extensions = Tokenizer(backend).extensions(token_of[first_byte])
    longer = {piece for piece in token_of if piece[:1] == first_byte and len(piece) > 1}
    assert longer
    assert longer <= {table[token_id] for token_id in extensions}


@pytest.mark.parametrize("token", [BOS, USER])
def test_added_tokens_have_none_and_are_none(backend: Backend, token: str) -> None:
    tokenizer = Tokenizer(backend)
    added = backend.token_to_id(token)
    assert tokenizer.extensions(added) == ()
    (bracket,) = tokenizer.encode("<")
    assert added not in tokenizer.extensions(bracket)
    assert tokenizer.extensions(tokenizer.vocab_size) == ()


def test_bytes_of_a_vocabulary_of_characters_are_not_their_names() -> None:
    vocabulary = {"<": 0, "<0x0A>": 1, "<0": 2, "▁": 3, "▁import": 4, "im": 5}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = Tokenizer(backend)
    assert tokenizer.extensions(1) == ()
    assert tokenizer.extensions(0) == (0, 2)
    assert tokenizer.extensions(3) == (3, 4)


@pytest.mark.parametrize("prompt", ["def fibonacci(n):", "class Queue:", "def main(", "a = 1"])
def test_the_cut_and_the_choice_are_those_of_transformers(prompt: str) -> None:
    import torch
    from transformers import GenerationMixin, PreTrainedTokenizerFast

    class Recorder:
        """Notes what transformers would read, and among which tokens it would choose the next."""

        def __init__(self) -> None:
            self.read: list[int] = []
            self.choice: set[int] = set()

        def generate(self, input_ids: torch.Tensor, generation_config: Any) -> torch.Tensor:
            self.read = input_ids[0].tolist()
            self.choice = {one for (one,) in generation_config.sequence_bias}
            return torch.cat([input_ids, input_ids[:, -1:]], dim=1)

    theirs = PreTrainedTokenizerFast.from_pretrained(builtin_model_path())
    ours = Tokenizer.load(builtin_model_path())
    token_ids = ours.encode(prompt)
    recorder = Recorder()
    heal: Any = GenerationMixin.heal_tokens
    heal(recorder, torch.tensor([token_ids]), theirs)
    extensions = ours.extensions(token_ids[-1])
    if not recorder.read:
        assert (prompt, extensions) == ("a = 1", (token_ids[-1],))
        return
    # They put padding in the place of the token that begins a text.
    assert recorder.read == [ours.pad_token_id, *token_ids[1:-1]]
    assert recorder.choice == set(extensions)
