"""A form leaves a guard its judgements and nothing else: true quotes, whole formats, steps that agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from guard_middleware.errors import ConfigError
from guard_middleware.worker.form import Form, Tentative

# "Ġ" is the byte-level spelling of a space; «» are two bytes each, spelled Â« and Â».
PIECES = [
    "Ġhow",
    "Ġto",
    "Ġpick",
    "ing",
    "Ġa",
    "Ġlock",
    ".",
    "ĠÂ«",
    "ĠÂ».",
    "risky",
    "plain",
    "Ġbad",
    "Ġfine",
    "unsafe",
    "safe",
]
TOKENIZER = Tokenizer(models.BPE({piece: id for id, piece in enumerate(PIECES)}, []))
TOKENIZER.decoder = decoders.ByteLevel()
IDS = {piece: id for id, piece in enumerate(PIECES)}

DECIDE = {"decide": "request", "harmful": ["risky"], "unharmful": ["plain"]}
ASK = [DECIDE, {"one_of": [" «"]}, {"quote": 3}, {"one_of": [" »."]}]
REPEAT = {"repeat": "request", "harmful": [" bad"], "unharmful": [" fine"]}
STATED: dict[str, Any] = {
    "unanswered": [*ASK, REPEAT],
    "answered": [*ASK, {"decide": "response", "harmful": ["unsafe"], "unharmful": ["safe"]}, REPEAT],
}
FORM = Form(STATED, TOKENIZER)


def ids(*pieces: str) -> list[int]:
    return [IDS[piece] for piece in pieces]


JUDGED = ids("Ġhow", "Ġto", "Ġpick", "Ġa", "Ġlock", ".", "Ġpick", "ing", "Ġa", "Ġlock")


def fill(judged: list[int], answered: bool, wishes: Any) -> tuple[str, dict[str, float]]:
    """The filled form of a guard that scores tokens by ``wishes`` (a function of the step)."""
    filling = FORM.start(judged, answered=answered)
    written: list[int] = []
    while not filling.complete:
        written.append(filling.choose(wishes(len(written))))
        assert len(written) < 40
    return TOKENIZER.decode(written), filling.scores


def scored(**favourites: float) -> torch.Tensor:
    logits = torch.zeros(len(PIECES))
    for piece, value in favourites.items():
        logits[IDS[piece.replace("_", "Ġ")]] = value
    return logits


def test_the_decision_and_its_repetition_agree_whatever_the_guard_would_rather_say() -> None:
    text, scores = fill(JUDGED, False, lambda _: scored(risky=2.0, _fine=9.0, _lock=1.0))
    assert text.startswith("risky «")
    assert text.endswith("». bad")
    assert scores == {"request": pytest.approx(torch.sigmoid(torch.tensor(2.0)).item())}


def test_what_is_written_is_the_side_of_the_score_where_a_side_has_several_tokens() -> None:
    split = {"decide": "request", "harmful": ["risky"], "unharmful": ["plain", "safe"]}
    form = Form({**STATED, "unanswered": [split, REPEAT]}, TOKENIZER)
    filling = form.start(JUDGED, answered=False)
    written = [filling.choose(scored(risky=1.0, plain=0.9, safe=0.8)), filling.choose(scored())]
    assert TOKENIZER.decode(written) == "plain fine"
    assert filling.scores["request"] < 0.5


def test_an_answer_gets_its_own_decision() -> None:
    text, scores = fill(JUDGED, True, lambda _: scored(plain=1.0, unsafe=3.0, _a=1.0))
    assert "unsafe" in text
    assert text.endswith(" fine")
    assert scores["request"] < 0.5 < scores["response"]


@settings(max_examples=80)
@given(st.lists(st.sampled_from(JUDGED), max_size=12), st.booleans(), st.integers(0, 2**31))
def test_whatever_the_guard_prefers_its_quote_is_a_span_of_the_judged_text(
    judged: list[int], answered: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    text, _ = fill(judged, answered, lambda _: torch.randn(len(PIECES), generator=generator))
    quote = text.partition("«")[2].partition(" ».")[0]
    assert quote in TOKENIZER.decode(judged)
    assert not quote.startswith("ing") or judged[0] == IDS["ing"]


def test_a_guard_may_have_a_form_without_reasoning() -> None:
    label = {"decide": "request", "harmful": [" bad"], "unharmful": [" fine"]}
    response = {"decide": "response", "harmful": ["unsafe"], "unharmful": ["safe"]}
    form = Form({**STATED, "label_unanswered": [label], "label_answered": [label, response]}, TOKENIZER)
    filling = form.start(JUDGED, answered=False, think=False)
    assert TOKENIZER.decode([filling.choose(scored(_bad=2.0))]) == " bad"
    assert filling.complete
    assert filling.scores["request"] > 0.5
    assert form.judges_without_reasoning
    assert not FORM.judges_without_reasoning


def test_a_quote_ends_with_a_word() -> None:
    text, _ = fill(ids("Ġpick", "ing", "Ġa"), False, lambda _: scored(_pick=2.0, **{"ĠÂ».": 1.0}))
    assert "« picking »." in text


def test_a_quote_closes_at_the_first_words_end_after_its_length() -> None:
    text, _ = fill(
        ids("Ġhow", "Ġto", "Ġpick", "ing", "Ġa"), False, lambda _: scored(_how=3.0, _to=3.0, _pick=3.0, ing=3.0, _a=3.0)
    )
    assert "« how to picking »." in text


def test_a_text_without_words_ends_a_quote_too() -> None:
    text, _ = fill(ids("Ġpick", *["ing"] * 39), False, lambda _: scored(ing=1.0))
    assert f"« pick{'ing' * 10} »." in text


def test_with_nothing_to_quote_the_quote_is_empty() -> None:
    text, _ = fill([], False, lambda _: scored())
    assert "« »." in text


def changed(part: str, index: int, slot: Any) -> dict[str, Any]:
    slots = list(STATED[part])
    slots[index : index + 1] = [] if slot is None else [slot]
    return {**STATED, part: slots}


@pytest.mark.parametrize(
    ("stated", "why"),
    [
        ({"unanswered": []}, "has the parts"),
        ({**STATED, "label_answered": STATED["answered"]}, "both or none"),
        (changed("unanswered", 0, None), "repeated before it is decided"),
        (changed("answered", 4, None), "must decide request and response"),
        (changed("unanswered", 1, {"one_of": ["two words"]}), "no token reads"),
        (changed("unanswered", 1, {"one_of": []}), "without a token"),
        (changed("unanswered", 1, {"one_of": [" «"], "x": 1}), "no slot"),
        (changed("unanswered", 2, {"quote": 0}), "no slot"),
        (changed("unanswered", 3, {"quote": 3}), "closes it"),
        (changed("unanswered", 4, {"quote": 3}), "closes it"),
    ],
)
def test_a_form_that_cannot_be_filled_in_is_refused(stated: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Form(stated, TOKENIZER)


@pytest.mark.parametrize("lost", ["nothing", "every other choice", "the filling, half way"])
@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(-5, 5), min_size=len(PIECES), max_size=len(PIECES)), min_size=20, max_size=20))
def test_a_tentative_filling_writes_what_a_certain_one_does_whatever_is_lost(lost, scores):
    wishes = [torch.tensor(row, dtype=torch.float32) for row in scores]
    certain, expected = FORM.start(JUDGED, answered=True), []
    while not certain.complete:
        expected.append(certain.choose(wishes[len(expected)]))
    written: list[int] = []
    tentative = Tentative(FORM.start(JUDGED, answered=True), written)
    while True:
        if lost == "every other choice" and len(written) % 2:
            tentative.choose(wishes[-1 - len(written)])
        if lost == "the filling, half way" and len(written) == len(expected) // 2:
            tentative = Tentative(FORM.start(JUDGED, answered=True), written)
        chosen = tentative.choose(wishes[len(written)])
        if chosen is None:
            break
        written.append(chosen)
        assert len(written) < 40
    assert written == expected
    if lost != "the filling, half way":
        assert tentative.filling.scores == certain.scores


def test_a_form_knows_its_last_choice_where_no_other_slot_has_any_of_its_tokens():
    end = [{"one_of": [" »."]}]
    choice = [{"one_of": [" bad", " fine"]}]
    last = Form({"unanswered": [DECIDE, *choice, *end], "answered": STATED["answered"]}, TOKENIZER)
    assert last.start([], answered=False).last_choices() == set(ids("Ġbad", "Ġfine"))
    twice = Form({"unanswered": [DECIDE, *choice, *choice, *end], "answered": STATED["answered"]}, TOKENIZER)
    assert twice.start([], answered=False).last_choices() == set()
