"""What may be written between quotation marks: spans of the judged text, whole words, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from guard_middleware.worker.quotes import Quotes

# "Ġ" is the byte-level spelling of a space; «» are two bytes each, spelled Â« and Â».
PIECES = ["Ġhow", "Ġto", "Ġpick", "ing", "Ġa", "Ġlock", ".", ":ĠÂ«", "ĠÂ».", "Ġnone", "Step", "Ċ"]
TOKENIZER = Tokenizer(models.BPE({piece: id for id, piece in enumerate(PIECES)}, []))
TOKENIZER.decoder = decoders.ByteLevel()
IDS = {piece: id for id, piece in enumerate(PIECES)}
QUOTES = Quotes(TOKENIZER, "«»")


def ids(*pieces: str) -> list[int]:
    return [IDS[piece] for piece in pieces]


JUDGED = ids("Ġhow", "Ġto", "Ġpick", "Ġa", "Ġlock", ".", "Ġpick", "ing", "Ġa", "Ġlock")
OPEN, CLOSE = ":ĠÂ«", "ĠÂ»."


@pytest.mark.parametrize(
    ("written", "allowed"),
    [
        ((), None),
        (("Step",), None),
        (("Step", OPEN, "Ġa", CLOSE), None),
        ((OPEN, "Ġhow"), ("Ġto", CLOSE)),
        ((OPEN, "Ġpick"), ("Ġa", "ing", CLOSE)),
        ((OPEN, "Ġa", "Ġlock"), (".", CLOSE)),
        ((OPEN, "Ġa", CLOSE, OPEN, "Ġhow", "Ġto"), ("Ġpick", CLOSE)),
    ],
)
def test_a_quote_follows_the_judged_text(written: tuple[str, ...], allowed: tuple[str, ...] | None) -> None:
    expected = None if allowed is None else sorted(ids(*allowed))
    assert QUOTES.allowed(JUDGED, ids(*written)) == expected


def test_a_quote_does_not_close_inside_a_word() -> None:
    assert QUOTES.allowed(ids("Ġpick", "ing", "Ġa"), ids(OPEN, "Ġpick")) == ids("ing")


def test_without_anything_to_quote_the_quote_can_only_close() -> None:
    assert QUOTES.allowed([], ids(OPEN)) == ids(CLOSE)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(JUDGED), max_size=12), st.randoms(use_true_random=False))
def test_whatever_is_chosen_the_quote_is_a_span_of_the_judged_text(judged: list[int], random: object) -> None:
    written = ids(OPEN)
    for _ in range(20):
        allowed = QUOTES.allowed(judged, written)
        assert allowed
        written.append(random.choice(allowed))  # type: ignore[attr-defined]
        if written[-1] == IDS[CLOSE]:
            break
    text = TOKENIZER.decode(written[1:]).removesuffix(" ».")
    assert text in TOKENIZER.decode(judged)
