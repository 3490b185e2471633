"""No text is shown that a stop text could take back, and none is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mortise.checkpoint import StreamDecoder
from mortise.engine.text import TextStream

LETTERS = "abé"


def stream(stops: tuple[str, ...], prompt: str = "") -> TextStream:
    """Every token is one byte, as in a vocabulary of bytes."""
    decoder = StreamDecoder(lambda ids: bytes(ids).decode(errors="replace"))
    return TextStream(decoder, list(prompt.encode()), stops)


def shown(text: str, stops: tuple[str, ...]) -> tuple[list[str], str | None]:
    """The pieces that are shown, and what stopped the text."""
    own = stream(stops)
    pieces = []
    for byte in text.encode():
        pieces.append(own.push(byte))
        if own.stopped_by is not None:
            break
    pieces.append(own.flush())
    return pieces, own.stopped_by


@given(
    text=st.text(LETTERS, max_size=20),
    stops=st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_the_text_ends_before_the_first_stop(text: str, stops: tuple[str, ...]) -> None:
    pieces, stopped_by = shown(text, stops)
    if not any(stop in text for stop in stops):
        assert (stopped_by, "".join(pieces)) == (None, text)
        return
    assert stopped_by in stops
    # The stop text that is complete first wins; of those, the one that begins first.
    complete = min(text.find(stop) + len(stop) for stop in stops if stop in text)
    begun = min(text.find(s) for s in stops if s in text and text.find(s) + len(s) == complete)
    assert "".join(pieces) == text[:begun]


@given(text=st.text(LETTERS, max_size=20), stop=st.text(LETTERS, min_size=1, max_size=4))
def test_nothing_is_held_back_that_begins_no_stop(text: str, stop: str) -> None:
    own, so_far = stream((stop,)), ""
    for place, letter in enumerate(text):
        for byte in letter.encode():
            so_far += own.push(byte)
        if own.stopped_by is not None:
            return
        held = text[len(so_far) : place + 1]
        assert stop.startswith(held)
        assert len(held) < len(stop)


def test_half_a_character_waits_and_is_replaced_at_the_end() -> None:
    own = stream(())
    assert own.push("é".encode()[0]) == ""
    assert own.push("é".encode()[1]) == "é"
    assert own.push("é".encode()[0]) == ""
    assert own.flush() == "\N{REPLACEMENT CHARACTER}"


def test_the_prompt_is_context_and_no_part_of_the_text() -> None:
    calls: list[list[int]] = []

    def decode(ids: list[int]) -> str:
        # As a SentencePiece vocabulary: the space before a text's first word is dropped.
        calls.append(list(ids))
        return "".join({1: " Hello", 2: " world"}[i] for i in ids).removeprefix(" ")

    own = TextStream(StreamDecoder(decode), [1], ())
    assert own.push(2) == " world"
    assert TextStream(StreamDecoder(decode), [], ()).push(2) == "world"
