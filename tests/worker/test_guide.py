"""What may be written between quotation marks, and which tokens belong to one kind of question alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from guard_middleware.errors import ConfigError
from guard_middleware.worker.guide import Guide

# "Ġ" is the byte-level spelling of a space; «» are two bytes each, spelled Â« and Â».
PIECES = ["Ġhow", "Ġto", "Ġpick", "ing", "Ġa", "Ġlock", ".", ":ĠÂ«", "ĠÂ».", "Ġnone", "Step", "Ċ"]
TOKENIZER = Tokenizer(models.BPE({piece: id for id, piece in enumerate(PIECES)}, []))
TOKENIZER.decoder = decoders.ByteLevel()
IDS = {piece: id for id, piece in enumerate(PIECES)}
GUIDE = Guide(TOKENIZER, marks="«»", answered_only=["Step"], unanswered_only=[" none"])


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
    assert GUIDE.quotable(JUDGED, ids(*written)) == expected


def test_a_quote_does_not_close_inside_a_word() -> None:
    assert GUIDE.quotable(ids("Ġpick", "ing", "Ġa"), ids(OPEN, "Ġpick")) == ids("ing")


def test_without_anything_to_quote_the_quote_can_only_close() -> None:
    assert GUIDE.quotable([], ids(OPEN)) == ids(CLOSE)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(JUDGED), max_size=12), st.randoms(use_true_random=False))
def test_whatever_is_chosen_the_quote_is_a_span_of_the_judged_text(judged: list[int], random: object) -> None:
    written = ids(OPEN)
    for _ in range(20):
        allowed = GUIDE.quotable(judged, written)
        assert allowed
        written.append(random.choice(allowed))  # type: ignore[attr-defined]
        if written[-1] == IDS[CLOSE]:
            break
    text = TOKENIZER.decode(written[1:]).removesuffix(" ».")
    assert text in TOKENIZER.decode(judged)


def test_a_token_of_the_other_case_is_never_taken() -> None:
    logits = torch.zeros(len(PIECES))
    logits[IDS["Step"]], logits[IDS["Ġnone"]], logits[IDS["."]] = 3.0, 2.0, 1.0
    assert GUIDE.choose([], [], True, logits) == IDS["Step"]
    assert GUIDE.choose([], [], False, logits) == IDS["Ġnone"]
    logits[IDS["Ġnone"]] = 4.0
    assert GUIDE.choose([], [], True, logits) == IDS["Step"]


def test_inside_a_quote_the_likeliest_judged_token_is_taken() -> None:
    logits = torch.zeros(len(PIECES))
    logits[IDS["Step"]], logits[IDS["Ġlock"]] = 3.0, 1.0
    assert GUIDE.choose(JUDGED, ids(OPEN), False, logits) == IDS["Ġlock"]


def test_of_the_tokens_that_stand_once_no_second_is_taken_not_even_to_close_a_quote() -> None:
    guide = Guide(TOKENIZER, marks="«»", once=["Step", " none"])
    logits = torch.zeros(len(PIECES))
    logits[IDS["Step"]], logits[IDS["."]] = 3.0, 1.0
    assert guide.choose([], [], True, logits) == IDS["Step"]
    assert guide.choose([], ids("Ġnone"), True, logits) == IDS["."]


def test_a_name_that_is_no_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="no token reads"):
        Guide(TOKENIZER, answered_only=["two words"])
