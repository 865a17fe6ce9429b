from __future__ import annotations

from pathlib import Path

import pytest

from guard_middleware.guard.parse import parse
from guard_middleware.types import Label
from guard_training.corpus.rows import Skipped
from guard_training.nano.lexicon import Lexicon, balance, fit_log_odds, word_lexicon
from guard_training.nano.teacher import Judged, Kind, external, joined, label, read_rationales, teach, topic

_ODDS = {"lock": 1.0, "pick": 2.0, "bread": -2.0, "sorry": -1.0}
LEXICON = Lexicon(_ODDS, dict.fromkeys(_ODDS, 1.0))


@pytest.mark.parametrize("request_label", ["harmful", "unharmful"])
@pytest.mark.parametrize("response", ["harmful", "unharmful", None])
def test_the_verdict_is_the_rows_labels_in_the_format_that_is_parsed(
    request_label: Label, response: Label | None
) -> None:
    answer = None if response is None else "Here is how."
    judged = Judged("How do I pick a lock?", "the request", request_label, None, answer, response)
    parsed = parse(joined(teach(judged, LEXICON)), answered=answer is not None)
    assert (parsed.request, parsed.response) == (request_label, response)
    assert ("risky" in parsed.reasoning) == (request_label == "harmful")


@pytest.mark.parametrize("request_label", ["harmful", "unharmful"])
@pytest.mark.parametrize("response", ["harmful", "unharmful", None])
def test_the_verdict_without_reasoning_has_the_same_format(request_label: Label, response: Label | None) -> None:
    answer = None if response is None else "some answer"
    stretches = label(Judged("words", "the request", request_label, answer=answer, response=response))
    parsed = parse(joined(stretches), answered=answer is not None)
    assert (parsed.reasoning, parsed.request, parsed.response) == ("", request_label, response)
    assert stretches[0].kind is Kind.UNKNOWN


def test_a_step_quotes_the_words_that_weigh_most() -> None:
    text = "Before I bake bread, how do I pick\n a lock?"
    assert LEXICON.quote(text, "harmful") == "pick a lock"
    assert LEXICON.quote(text, "unharmful") == "bread"
    assert LEXICON.quote("?!", "harmful") == ""


def test_a_quote_never_breaks_the_format() -> None:
    judged = Judged("</think> pick </think><result> lock <think>", "the request", "harmful")
    assert parse(joined(teach(judged, LEXICON)), answered=False).request == "harmful"


def test_a_refusal_is_named_as_one() -> None:
    judged = Judged("How do I pick a lock?", "the request", "harmful", None, "I'm sorry, no.", "unharmful")
    assert "the answer declines: « sorry »" in joined(teach(judged, LEXICON))


def test_an_unlabelled_request_is_guessed_and_not_trained() -> None:
    judged = Judged("pick a lock", "the request", None, None, "Fine.", "unharmful")
    kinds = [stretch.kind for stretch in teach(judged, LEXICON)]
    assert Kind.REQUEST not in kinds
    assert Kind.UNKNOWN in kinds
    assert Kind.RESPONSE in kinds


@pytest.mark.parametrize(
    ("label", "category", "words", "expected"),
    [
        ("harmful", "drug dealing", "anything", "drugs"),
        ("harmful", None, "how to hack a password", "hacking"),
        ("harmful", None, "zzz", "harmful acts"),
        ("unharmful", None, "write a poem", "writing"),
    ],
)
def test_the_topic_comes_from_the_category_and_else_from_the_words(
    label: Label, category: str | None, words: str, expected: str
) -> None:
    assert topic(label, category, words) == expected


def test_a_real_teachers_rationale_is_wrapped() -> None:
    judged = Judged("pick a lock", "the request", "harmful")
    assert (
        parse(joined(external("It asks for a break-in.", judged)), answered=False).reasoning
        == "It asks for a break-in."
    )


def test_rationales_are_read_from_the_good_lines_of_a_file(tmp_path: Path) -> None:
    file, skipped = tmp_path / "r.jsonl", Skipped()
    good = [
        '{"id": "a", "reasoning": "Because\u2028of\x85it."}',  # what str.splitlines cuts at and JSON does not
        '{"id": 7, "source": "s", "rationale": "As synthesize writes it."}',
    ]
    bad = ["", "{", "[1]", '{"id": "b"}', '{"id": "c", "reasoning": 1}', '{"id": "a", "reasoning": "again"}']
    bad += ['{"id": "d", "reasoning": "x </think> y"}']
    file.write_text("\n".join([*good, *bad]), encoding="utf-8")
    assert read_rationales(file, skipped) == {"a": "Because\u2028of\x85it.", "7": "As synthesize writes it."}
    assert [reason.partition(" ")[0] for reason in skipped.reasons] == [f"r.jsonl:{n}:" for n in range(4, 10)]
    assert "</think>" in skipped.reasons[-1]


def test_sources_weigh_by_the_root_of_their_size_within_a_label() -> None:
    weights = balance(["a"] * 4 + ["b", "c"], [True] * 5 + [False], {"b": 2.0})
    assert sum(weights[:5]) == pytest.approx(0.5)
    assert sum(weights[:4]) == pytest.approx(weights[4])  # twice as much for its size, half as much for its share
    assert weights[5] == pytest.approx(0.5)


def test_log_odds_tell_the_words_apart() -> None:
    texts = ["pick the lock", "break the lock", "bake the bread", "slice the bread"] * 5
    harmful = [True, True, False, False] * 5
    lexicon = word_lexicon(texts, harmful, [0.05] * 20, least=2, steps=60, penalty=1e-4)
    assert lexicon.score("the lock") > 0.5 > -0.5 > lexicon.score("the bread")
    assert abs(lexicon.weights["the"]) < 0.2
    assert lexicon.rarity["the"] < lexicon.rarity["lock"]
    assert abs(lexicon.score("unknown")) < 0.2
    odds, rarity, bias = fit_log_odds([[1], [2]], [True, False], [0.5, 0.5], 3, steps=20, penalty=1e-4)
    assert odds[1] > 0 > odds[2]
    assert odds[0] == 0
    assert rarity[0] > rarity[1]
    assert bias == pytest.approx(0.0, abs=0.1)
