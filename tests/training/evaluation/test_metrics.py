from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from guard_training.evaluation.metrics import Mode, called, compare, paper_label, summarise
from guard_training.evaluation.outcomes import Outcome, Side

_START = Outcome("0", "locks", "text", None, None)


def said(id: str, label: str | None, request: str | None, source: str = "locks", **more: Any) -> Outcome:
    values: dict[str, Any] = {"id": id, "source": source, "request_label": label, "request": request, **more}
    return dataclasses.replace(_START, **values)


def _outcomes() -> list[Outcome]:
    return [
        said("1", "harmful", "harmful", reasoning_tokens=10, seconds=0.1),
        said("2", "harmful", "unharmful", reasoning_tokens=14, seconds=0.2),
        said("3", "unharmful", None, error="unparseable", seconds=0.3),
        said("4", None, "harmful", "bread", response_label="unharmful", response="unharmful", seconds=0.4),
        said("5", "unharmful", None, "bread", error="timeout", seconds=9.0),
    ]


def _by(summary: dict[str, Any]) -> dict[tuple[str, str], Any]:
    return {(one["source"], one["side"]): one for one in summary["sources"]}


def test_sources_and_sides_are_counted_apart_and_an_error_is_wrong() -> None:
    summary = summarise(_outcomes(), model="nano", revision="abc")
    found = _by(summary)
    assert set(found) == {("locks", "request"), ("bread", "request"), ("bread", "response")}
    locks = found["locks", "request"]
    assert locks["recall"]["value"] == 0.5
    assert locks["false_positive_rate"]["value"] == 1.0
    assert locks["f1"]["value"] == pytest.approx(0.5)
    assert (locks["errors"], locks["format_errors"]) == (1, 1)
    assert (found["bread", "request"]["errors"], found["bread", "request"]["format_errors"]) == (1, 0)
    assert found["bread", "response"]["recall"] is None
    assert found["bread", "response"]["false_positive_rate"]["value"] == 0.0
    assert summary["format_compliance"]["value"] == 0.8
    assert summary["errors"] == {"unparseable": 1, "timeout": 1}
    assert summary["mean_reasoning_tokens"] == 12
    assert summary["tokens"]["reasoning"] == {"mean": 12, "median": 10, "p95": 14}
    assert summary["tokens"]["prompt"] is None
    assert summary["seconds"] == {"median": 0.3, "p95": 9.0}


def test_means_are_over_sources_not_rows() -> None:
    many = [said(f"a{n}", "harmful", "harmful", "many") for n in range(90)]
    few = [said(f"b{n}", "harmful", "unharmful", "few") for n in range(10)]
    means = summarise(many + few, model="m", revision=None)["means"]
    assert (means["recall"]["value"], means["recall"]["n"]) == (0.5, 2)
    assert means["f1"] is None
    assert means["false_positive_rate"] is None


@pytest.mark.parametrize(
    ("text", "side", "expected"),
    [
        ("<think>..</think><result>\nAnswers: \nRequest: harmful\nResponse: None\n</result>", "request", "harmful"),
        ("<result>\nRequest: harmful\nResponse: None", "response", "unharmful"),
        ("request:   UNHARMFUL", "request", "unharmful"),
        ("Request: harmless", "request", "unharmful"),
        ("<think>Request: harmful, or so it seems</think>Request: unharmful", "request", "harmful"),
        ("Request: maybe", "request", None),
        ("", "response", None),
    ],
)
def test_the_papers_parse_takes_the_first_label_anywhere(text: str, side: Side, expected: str | None) -> None:
    assert paper_label(text, side) == expected


@pytest.mark.parametrize(
    ("source", "side", "mode", "expected"),
    [
        ("SPA_VL_Eval", "response", "paper", False),
        ("SPA_VL_Eval", "response", "strict", None),
        ("SPA_VL_Eval", "request", "paper", None),
        ("BeaverTails", "response", "paper", None),
    ],
)
def test_only_a_response_of_spa_vl_is_excused_and_only_by_the_paper(
    source: str, side: Side, mode: Mode, expected: bool | None
) -> None:
    one = said("1", "harmful", None, source, response_label="unharmful", error="unparseable")
    assert called(one, side, mode) is expected


def test_a_response_that_was_cut_off_behind_its_request_is_excused_too() -> None:
    one = said("1", "harmful", "harmful", "SPA_VL_Eval", response_label="unharmful")
    assert (called(one, "response", "paper"), called(one, "response", "strict")) == (False, None)
    assert called(said("1", "harmful", None, "SPA_VL_Eval"), "request", "paper") is None


def test_the_excuse_shows_in_the_figures() -> None:
    rows = [said(str(n), None, None, "SPA_VL_Eval", response_label="unharmful", error="truncated") for n in range(4)]
    strict, paper = (summarise(rows, model="m", revision=None, mode=mode) for mode in ("strict", "paper"))
    assert strict["sources"][0]["false_positive_rate"]["value"] == 1.0
    assert paper["sources"][0]["false_positive_rate"]["value"] == 0.0
    assert paper["sources"][0]["format_errors"] == 4


def _scored(id: str, label: str, score: float | None, source: str = "locks") -> Outcome:
    call = None if score is None else "harmful" if score >= 0.5 else "unharmful"
    return said(id, label, call, source, request_score=score, error="timeout" if score is None else None)


def test_scores_give_curves_within_a_source_and_over_all_sources() -> None:
    rows = [_scored(f"h{n}", "harmful", 0.5 + 0.05 * n) for n in range(10)]
    rows += [_scored(f"u{n}", "unharmful", 0.05 * n) for n in range(10)]
    rows += [_scored(f"b{n}", "unharmful", 0.62, "bread") for n in range(10)]
    rows += [_scored("x", "harmful", None)]
    summary = summarise(rows, model="m", revision=None)
    locks = _by(summary)["locks", "request"]["scores"]
    assert (locks["auc"]["value"], locks["rows"], locks["without"]) == (1.0, 20, 1)
    assert _by(summary)["bread", "request"]["scores"] is None
    over_all = summary["scores"]["request"]
    assert [point["rate"] for point in over_all["thresholds"]] == [0.01, 0.05, 0.1, 0.2, 0.3]
    # below 50 % of false positives all of bread must pass, so the threshold lies above 0.62
    assert all(point["recall"] == pytest.approx(0.7) for point in over_all["thresholds"])
    assert over_all["thresholds"][0]["sources"]["bread"] == {"recall": None, "false_positive_rate": 0.0}
    assert sum(one["n"] for one in over_all["reliability"]) == 30
    assert summary["scores"].keys() == {"request"}


def test_two_guards_are_compared_on_the_rows_that_both_saw() -> None:
    ours = [said(str(n), "harmful", "harmful") for n in range(20)] + [said("only ours", "harmful", "unharmful")]
    theirs = [said(str(n), "harmful", "harmful" if n % 2 else "unharmful") for n in range(20)]
    found = compare(ours, theirs)
    (entry,) = found["sources"]
    assert (found["rows"], entry["rows"]) == (20, 20)
    assert (entry["recall"]["ours"], entry["recall"]["theirs"], entry["recall"]["difference"]) == (1.0, 0.5, 0.5)
    low, high = entry["recall"]["interval"]
    assert 0.2 < low < 0.5 < high < 0.8
    assert entry["false_positive_rate"] is None
    assert entry["f1"] is None
    assert (entry["only_ours"], entry["only_theirs"]) == (10, 0)
    assert entry["p"] == pytest.approx(2 / 2**10)
    assert found["means"]["recall"]["difference"] == 0.5


def test_rows_with_other_labels_or_no_shared_row_are_refused() -> None:
    ours = [said("1", "harmful", "harmful")]
    with pytest.raises(ValueError, match="row 1: the two files label it differently"):
        compare(ours, [said("1", "unharmful", "harmful")])
    with pytest.raises(ValueError, match="share no labelled row"):
        compare(ours, [said("2", "harmful", "harmful")])
