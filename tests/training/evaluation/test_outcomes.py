from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.types import Usage, Verdict
from guard_training.corpus.rows import Row, Skipped
from guard_training.evaluation.outcomes import (
    Outcome,
    OutcomeError,
    from_json,
    modality,
    outcome,
    read_outcomes,
    to_json,
    write_outcomes,
)

_LABELS = st.sampled_from(["harmful", "unharmful", None])
_SCORES = st.none() | st.floats(0, 1)
_COUNTS = st.none() | st.integers(0, 10_000)
_OUTCOMES = st.builds(
    Outcome,
    id=st.text(),
    source=st.text(),
    modality=st.sampled_from(["text", "image", "text_image"]),
    request_label=_LABELS,
    response_label=_LABELS,
    request=_LABELS,
    response=_LABELS,
    request_score=_SCORES,
    response_score=_SCORES,
    error=st.none() | st.sampled_from([kind.value for kind in GuardErrorKind]),
    prompt_tokens=_COUNTS,
    completion_tokens=_COUNTS,
    reasoning_tokens=_COUNTS,
    seconds=st.none() | st.floats(0, 1e6),
    model=st.text(),
    revision=st.text(),
)


@given(_OUTCOMES)
def test_an_outcome_comes_back_as_it_was_written(one: Outcome) -> None:
    assert from_json(json.loads(json.dumps(to_json(one)))) == one


def test_a_record_holds_what_was_said_and_no_text() -> None:
    row = Row("7", "locks", "SECRET prompt", "harmful", "SECRET answer", "unharmful")
    verdict = Verdict(
        "harmful", "unharmful", 0.9, 0.2, "SECRET reasoning", Usage(10, 20, 12), "nano", "abc", drawn_text=("SECRET",)
    )
    said = outcome(row, verdict, seconds=0.5, model="nano", revision="abc")
    assert (said.label("request"), said.called("request"), said.score("request")) == ("harmful", "harmful", 0.9)
    assert (said.label("response"), said.called("response"), said.score("response")) == ("unharmful", "unharmful", 0.2)
    assert (said.prompt_tokens, said.completion_tokens, said.reasoning_tokens) == (10, 20, 12)
    assert "SECRET" not in json.dumps(to_json(said))


def test_an_error_is_its_kind_and_no_label() -> None:
    error = GuardError(GuardErrorKind.TRUNCATED, "no verdict")
    said = outcome(Row("7", "locks", "p", "harmful"), error, seconds=1.0, model="nano", revision="abc")
    assert (said.error, said.request, said.request_score, said.completion_tokens) == ("truncated", None, None, None)


@pytest.mark.parametrize(
    ("prompt", "response", "image", "expected"),
    [
        ("p", None, False, "text"),
        ("", None, True, "image"),
        ("p", None, True, "text_image"),
        ("", "r", True, "text_image"),
    ],
)
def test_modality_is_the_papers(prompt: str, response: str | None, image: bool, expected: str) -> None:
    row = Row("1", "s", prompt, "harmful", response, image=Path("a.png") if image else None)
    assert modality(row) == expected


def test_an_answer_that_nobody_gave_has_no_label() -> None:
    row = Row("1", "s", "p", "harmful", None, "harmful")
    said = outcome(row, GuardError("timeout"), seconds=None, model="", revision="")
    assert said.response_label is None


_GOOD = {"id": "1", "source": "s", "modality": "text", "request_label": "harmful", "response_label": None}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"request_label": "bad"}, "'bad' is none of harmful, unharmful"),
        ({"request_score": 1.5}, "outside 0..1"),
        ({"request_score": float("nan")}, "outside 0..1"),
        ({"modality": "sound"}, "'sound' is none of"),
        ({"reasoning_tokens": -1}, "not a count"),
        ({"prompt": "text of the row"}, "unknown key 'prompt'"),
        ({"id": 3}, "3 is not a text"),
        ({"seconds": 10**400}, "too large"),
        ({"id": "0"}, "id '0' a second time"),
    ],
)
def test_a_bad_line_is_named_with_its_reason_and_the_others_go_on(
    tmp_path: Path, change: dict[str, object], why: str
) -> None:
    path, skipped = tmp_path / "out.jsonl", Skipped()
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in ({**_GOOD, "id": "0"}, {**_GOOD, **change}, {**_GOOD, "id": "2"}))
    )
    assert [one.id for one in read_outcomes(path, skipped)] == ["0", "2"]
    (reason,) = skipped.reasons
    assert reason.startswith("out.jsonl:2: ")
    assert why in reason


@pytest.mark.parametrize("content", ["", "no\n", "[" * 100_000 + "\n"])
def test_a_file_without_an_outcome_says_who_writes_them(tmp_path: Path, content: str) -> None:
    (tmp_path / "out.jsonl").write_text(content)
    with pytest.raises(OutcomeError, match="evaluate --outcomes"):
        read_outcomes(tmp_path / "out.jsonl", Skipped())


def test_a_file_of_outcomes_is_read_back(tmp_path: Path) -> None:
    one = from_json(_GOOD)
    write_outcomes(tmp_path / "a" / "out.jsonl", [one])
    assert read_outcomes(tmp_path / "a" / "out.jsonl", Skipped()) == [one]
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["out.jsonl"]
