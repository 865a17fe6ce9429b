from __future__ import annotations

import base64
import random
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from guard_training.evaluation.benchmarks import paper_table
from guard_training.evaluation.metrics import compare, summarise
from guard_training.evaluation.outcomes import Outcome
from guard_training.evaluation.report import SHOWN, mistakes, render

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Raises for a tag that is not closed in its turn; keeps images, headings and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outcomes(model: str, *, skill: float, source: str = "lo<cks", scores: bool = True, n: int = 80) -> list[Outcome]:
    rng = random.Random(7)
    out = []
    for number in range(n):
        harmful = number % 2 == 0
        score = min(1.0, max(0.0, (0.5 + skill if harmful else 0.5 - skill) + rng.uniform(-0.4, 0.4)))
        out.append(
            Outcome(
                id=f"{source}-{number}",
                source=source,
                modality="text",
                request_label="harmful" if harmful else "unharmful",
                response_label=None,
                request="harmful" if score >= 0.5 else "unharmful",
                request_score=score if scores else None,
                prompt_tokens=100 + number,
                completion_tokens=20,
                reasoning_tokens=10 + number % 7,
                seconds=0.1 + 0.01 * number,
                model=model,
                revision="abc",
            )
        )
    return out


def page(found: dict[str, list[Outcome]], **more: Any) -> str:
    summaries = {
        name: {**summarise(given, model=name, revision="abc"), "benchmarks": paper_table(given, "strict")}
        for name, given in found.items()
    }
    return render(summaries, found, facts=[("Data", "made-up.jsonl")], mode="strict", **more)


def test_the_page_is_well_formed_self_contained_and_holds_its_plots() -> None:
    ours, theirs = outcomes("no<va", skill=0.3), outcomes("tf-idf", skill=0.1)
    text = page(
        {"no<va": ours, "tf-idf": theirs},
        compared={"ours": "a", "theirs": "b", **compare(ours, theirs)},
        skipped="1 left <out>",
    )
    found = Page(text)
    assert len(found.images) == 4  # rates, curves, calibration, cost
    for image in found.images:
        head, _, data = image.partition(",")
        assert head == "data:image/svg+xml;base64"
        drawing = ElementTree.fromstring(base64.b64decode(data))
        assert drawing.tag.endswith("svg")
        links = [v for e in drawing.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert links
        assert all(link.startswith("#") for link in links)
    assert not re.search(r"https?:|//[a-z]", text)
    assert "script" not in found.tags
    assert "link" not in found.tags
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "href"]
    assert "no&lt;va" in text
    assert "no<va" not in text
    assert "lo<cks" not in text
    assert "1 left &lt;out&gt;" in text
    for heading in (
        "Sources",
        "Against the other guard",
        "Scores",
        "Calibration",
        "Cost",
        "Worst mistakes",
        "Rows left out",
    ):
        assert f"<h2>{heading}</h2>" in text
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text


def test_a_guard_without_scores_or_times_has_a_page_too() -> None:
    bare = [
        Outcome(
            f"{n}",
            "locks",
            "text",
            "harmful",
            "unharmful",
            "harmful" if n else None,
            "unharmful",
            error=None if n else "timeout",
        )
        for n in range(4)
    ]
    text = page({"api": bare})
    assert len(Page(text).images) == 1
    assert "<h2>Calibration</h2>" not in text
    assert "<h2>Against the other guard</h2>" not in text


def test_the_papers_figures_stand_beside_ours() -> None:
    text = page({"nano": outcomes("nano", skill=0.3, source="ToxicChat")})
    Page(text)
    assert "GuardReasoner-VL-Eco 3B (paper)" in text
    assert ">74.45<" in text
    assert "Another number of rows than the paper" in text
    assert "cannot be held against the paper" in text


def test_the_same_outcomes_draw_the_same_page() -> None:
    found = {"nano": outcomes("nano", skill=0.2)}
    assert page(found) == page(found)


def test_mistakes_are_ids_the_worst_first() -> None:
    found = outcomes("nano", skill=-0.3, n=2 * SHOWN + 20)
    missed, flagged = mistakes(found, "strict")
    assert missed.title == "lo<cks (request), missed"
    ids = missed.ids.split(", ")
    assert (len(ids), ids[-1], missed.count > SHOWN) == (SHOWN + 1, "...", True)
    scores = {one.id: one.request_score for one in found}
    shown = [scores[id] for id in ids[:-1]]
    assert shown == sorted(shown)  # type: ignore[type-var]
    assert flagged.title.endswith("wrongly flagged or without verdict")


@pytest.mark.parametrize("skill", [0.5, -0.5])
def test_a_guard_that_is_all_right_or_all_wrong_can_be_drawn(skill: float) -> None:
    Page(page({"nano": outcomes("nano", skill=skill)}))
