from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from mortise.checkpoint import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable

REPLACEMENT = "\ufffd"
quick = settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def pieces(tokenizer: Tokenizer, token_ids: Iterable[int], *, skip: bool = True) -> list[str]:
    decoder = tokenizer.stream_decoder(skip_special_tokens=skip)
    return [*(decoder.push(token_id) for token_id in token_ids), decoder.flush()]


@pytest.fixture(scope="module")
def tokenizer(backend: Backend) -> Tokenizer:
    return Tokenizer(Backend.from_str(backend.to_str()))


def test_a_character_of_several_tokens_appears_when_it_is_complete(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(letter)[0] for letter in "ab"]
    emoji = tokenizer.encode("🦀")
    assert len(emoji) == 3
    shown = pieces(tokenizer, [ids[0], *emoji, ids[1]])
    assert shown == ["a", "", "", "🦀", "b", ""]


def test_an_incomplete_character_at_the_end_is_replaced_only_by_flush(tokenizer: Tokenizer) -> None:
    shown = pieces(tokenizer, tokenizer.encode("a🦀")[:-1])
    assert shown == ["a", "", "", REPLACEMENT]


def test_a_real_replacement_character_is_text_like_any_other(tokenizer: Tokenizer) -> None:
    assert "".join(pieces(tokenizer, tokenizer.encode("a\ufffdb\ufffd"))) == "a\ufffdb\ufffd"


def test_special_tokens_inside_a_character(tokenizer: Tokenizer) -> None:
    first, *rest = tokenizer.encode("🦀")
    assert "".join(pieces(tokenizer, [first, 0, *rest])) == "🦀"


def test_flush_starts_anew(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream_decoder()
    for token_id in tokenizer.encode("ab"):
        decoder.push(token_id)
    decoder.flush()
    assert "".join([decoder.push(token_id) for token_id in tokenizer.encode("cd")]) == "cd"
    assert decoder.flush() == ""


@quick
@given(text=st.text(max_size=30), skip=st.booleans())
def test_a_text_comes_out_as_it_went_in(tokenizer: Tokenizer, text: str, skip: bool) -> None:
    shown = pieces(tokenizer, tokenizer.encode(text), skip=skip)
    assert "".join(shown) == text


@quick
@given(data=st.data(), skip=st.booleans())
def test_any_ids_come_out_as_decoded_at_once(
    tokenizer: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    shown = pieces(tokenizer, token_ids, skip=skip)
    assert "".join(shown) == tokenizer.decode(token_ids, skip_special_tokens=skip)
    assert not any(piece.endswith(REPLACEMENT) for piece in shown[:-1])


@quick
@given(text=st.text(alphabet="aé中🙂", max_size=20))
def test_no_replacement_character_ever_appears_in_valid_text(
    tokenizer: Tokenizer, text: str
) -> None:
    assert REPLACEMENT not in "".join(pieces(tokenizer, tokenizer.encode(text)))


@quick
@given(text=st.text(alphabet="aé中🙂", max_size=20))
def test_text_is_shown_as_early_as_it_is_complete(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    decoder = tokenizer.stream_decoder()
    shown = ""
    for count, token_id in enumerate(token_ids, start=1):
        shown += decoder.push(token_id)
        assert shown == tokenizer.decode(token_ids[:count]).rstrip(REPLACEMENT)


def test_decoding_looks_at_few_ids_however_long_the_text_is(tokenizer: Tokenizer) -> None:
    lengths: list[int] = []

    def decode(token_ids: object) -> str:
        assert isinstance(token_ids, list)
        lengths.append(len(token_ids))
        return tokenizer.decode(token_ids)

    decoder = StreamDecoder(decode)
    token_ids = tokenizer.encode("größer 中文字 🙂🦀 " * 20)
    for token_id in token_ids:
        decoder.push(token_id)
    assert len(token_ids) > 100
    assert max(lengths) <= 8


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """Words, and single bytes for what is no word, as in vocabularies made by SentencePiece."""
    words = ["<unk>", "▁Hello", "▁world", "▁", "a"]
    vocabulary = {word: index for index, word in enumerate(words)}
    vocabulary |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    own = Backend(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    own.pre_tokenizer = pre_tokenizers.Metaspace()
    own.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    own.add_special_tokens(["<s>"])
    return Tokenizer(own)


def byte_ids(text: bytes) -> list[int]:
    return [5 + byte for byte in text]


def test_the_space_between_words_is_kept_and_the_first_one_is_not(byte_fallback: Tokenizer) -> None:
    assert pieces(byte_fallback, [1, 2, 2]) == ["Hello", " world", " world", ""]


def test_a_skipped_token_does_not_swallow_the_space_after_it(byte_fallback: Tokenizer) -> None:
    special = byte_fallback.vocab_size - 1
    shown = pieces(byte_fallback, [special, 1, special, 2])
    assert "".join(shown) == "Hello world" == byte_fallback.decode([special, 1, special, 2])


def test_bytes_become_a_character_together(byte_fallback: Tokenizer) -> None:
    shown = pieces(byte_fallback, [1, *byte_ids("€€".encode()), 2])
    assert shown == ["Hello", "", "", "€", "", "", "€", " world", ""]


def test_bytes_that_never_become_a_character_do_not_stop_the_text(byte_fallback: Tokenizer) -> None:
    shown = pieces(byte_fallback, [1, *byte_ids("€".encode() + b"\xe2"), 2, 1])
    assert "".join(shown) == "Hello€\ufffd world Hello"


@quick
@given(data=st.data())
def test_bytes_in_any_order_lose_no_word(byte_fallback: Tokenizer, data: st.DataObject) -> None:
    token_ids = data.draw(
        st.lists(st.sampled_from([1, 4, *byte_ids("€a🙂".encode())]), max_size=20)
    )
    shown = pieces(byte_fallback, token_ids)
    text = byte_fallback.decode(token_ids)
    assert "".join(shown).count("Hello") == text.count("Hello")
    if REPLACEMENT not in text:
        assert "".join(shown) == text
