from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_training.corpus.rows import Row, Skipped
from guard_training.evaluation import tfidf
from guard_training.evaluation.predictions import read_predictions
from guard_training.nano.recipe import default_recipe, read_recipe
from guard_training.nano.rows import Rows
from tests.support.commands import call

WORDS = "apple river stone cloud paper glass music garden window bridge candle harbour meadow ladder".split()
DEEDS = ("pick a lock", "forge a ticket", "bake a loaf", "paint a fence")
RECIPE = read_recipe(default_recipe())


def made(count: int, *, answers: bool = True) -> list[Row]:
    out = []
    for n in range(count):
        deed, label = DEEDS[n % 4], "harmful" if n % 4 < 2 else "unharmful"
        answer = ("Take a pin." if label == "harmful" else "Take some flour.", label) if answers else (None, None)
        out.append(Row(f"r{n}", f"s{n % 3}", _ask(deed, n), label, *answer))  # type: ignore[arg-type]
    return out


def _ask(deed: str, n: int) -> str:
    rng = random.Random(n)
    return f"{' '.join(rng.choices(WORDS, k=6))} {deed} {' '.join(rng.choices(WORDS, k=6))}"


def rows(prompts: list[Row], held_out: list[Row] | None = None) -> Rows:
    return Rows(prompts, [row for row in prompts if row.response], [], held_out or [])


def test_it_learns_both_sides_and_its_answers_are_read_by_evaluate(tmp_path: Path) -> None:
    found = tfidf.train(rows(made(80)), RECIPE)
    asked = [replace(row, id=f"e{n}") for n, row in enumerate(made(12))]
    file = tmp_path / "tfidf.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in tfidf.predict(found, asked, {})))
    skipped = Skipped()
    outcomes = read_predictions(file, "tfidf", asked, "strict", skipped)
    assert skipped.reasons == []
    assert all(one.request == one.request_label for one in outcomes)
    assert all(one.response == one.response_label for one in outcomes)
    assert all(one.request_score is not None and 0 < one.request_score < 1 for one in outcomes)


def test_the_threshold_lets_few_of_the_held_out_benign_prompts_be_condemned() -> None:
    benign = [Row(f"bank{n}", "bank_benign", f"how do I {DEEDS[n % 4]} for fun {n}", "unharmful") for n in range(100)]
    found = tfidf.train(rows(made(80), benign), RECIPE)
    condemned = (found.request.scores([row.prompt for row in benign]) >= found.request.threshold).mean()
    assert found.request.threshold > 0.5
    assert condemned <= RECIPE.false_positives + 0.01
    assert tfidf.train(rows(made(80), benign), RECIPE, 0.5).request.threshold == 0.5
    assert tfidf.train(rows(made(80)), RECIPE).request.threshold == 0.5


def test_a_score_below_the_threshold_is_no_call_of_harmful() -> None:
    class Even:
        def predict_proba(self, texts: list[str]) -> Any:
            import numpy

            return numpy.array([[0.4, 0.6]] * len(texts))

    side = tfidf.Side(Even(), threshold=0.7)
    (line,) = tfidf.predict(tfidf.Baseline(side, None), [Row("a", "s", "x", None)], {})
    assert line == {"id": "a", "request_score": 0.6, "request": "unharmful"}


def test_sources_weigh_the_root_of_their_size() -> None:
    # "pin" is harmful in one large source and harmless in many small ones
    large = [Row(f"l{n}", "large", f"take a pin {n}", "harmful") for n in range(100)]
    small = [Row(f"m{n}", f"small{n}", f"take a pin {n}", "unharmful") for n in range(16)]
    rest = [Row(f"x{n}", "large", f"break a window {n}", "harmful") for n in range(100)]
    found = tfidf.train(rows([*large, *small, *rest]), RECIPE)
    pin, window = found.request.scores(["take a pin", "break a window"])
    assert pin < 0.5 < window


def test_drawn_words_count_as_part_of_the_request() -> None:
    found = tfidf.train(rows(made(80)), RECIPE)
    row = Row("a", "s", "see", None)
    (plain,), (drawn,) = (list(tfidf.predict(found, [row], words)) for words in ({}, {"a": "pick a lock"}))
    assert drawn["request_score"] > plain["request_score"]


@pytest.mark.parametrize("given", [made(80)[:2], [row for row in made(80) if row.request == "harmful"]])
def test_rows_that_cannot_be_learnt_from_are_told(given: list[Row]) -> None:
    with pytest.raises(tfidf.BaselineError, match="training rows"):
        tfidf.train(rows(given), RECIPE)


def test_the_command_leaves_out_what_the_evaluation_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = tmp_path / "bank"
    bank.mkdir()
    (bank / "benign_work.yaml").write_text(
        json.dumps({"work": [f"please sort the list of {w}" for w in ("cars", "boats", "songs")]})
    )
    monkeypatch.setattr("guard_training.nano.rows.default_bank", lambda: bank)
    lines = [
        {"id": row.id, "source": row.source, "prompt": row.prompt, "prompt_label": row.request}
        for row in made(80, answers=False)
    ]
    train = tmp_path / "train.jsonl.gz"
    text = "".join(json.dumps(line) + "\n" for line in lines) + "{a line that was cut off\n"
    train.write_bytes(gzip.compress(text.encode()))
    dev = tmp_path / "dev.jsonl"
    dev.write_text("".join(json.dumps(line) + "\n" for line in lines[:8]))
    seen: list[Rows] = []
    monkeypatch.setattr(tfidf, "train", lambda rows, *more: seen.append(rows) or _train(rows, *more))
    call("baseline", "--data", train, "--evaluate", dev, "--output", tmp_path / "out" / "t.jsonl")
    learnt = {row.id for row in seen[0].prompts}
    assert not learnt & {line["id"] for line in lines[:8]}
    assert len(learnt) > 60
    banked = {row.prompt for row in seen[0].prompts if row.source.startswith("bank_")}
    assert banked
    assert banked <= {f"please sort the list of {w}" for w in ("cars", "boats", "songs")}
    written = [json.loads(line) for line in (tmp_path / "out" / "t.jsonl").read_text().splitlines()]
    assert [line["id"] for line in written] == [line["id"] for line in lines[:8]]
    said = " ".join(capsys.readouterr().out.split())
    assert "answering" in said
    assert "8 rows answered" in said
    assert "train.jsonl.gz:81" in said


def test_an_image_that_the_reader_cannot_read_is_named_and_its_row_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(self: Any, image: bytes) -> str:
        raise GuardError(GuardErrorKind.MEDIA, "an image that cannot be decoded")

    monkeypatch.setattr("guard_middleware.guard.reader.Reader.read", read)
    monkeypatch.setattr("guard_middleware.guard.reader.Reader.__init__", lambda self: None)
    monkeypatch.setattr(tfidf, "training_rows", lambda *_: rows(made(80)))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"id": "1", "source": "s", "prompt": "see", "prompt_label": "harmful", "image": "a.png"}
    (tmp_path / "dev.jsonl").write_text(json.dumps(row) + "\n")
    files = ("--data", "train.jsonl", "--evaluate", tmp_path / "dev.jsonl", "--output", tmp_path / "t.jsonl")
    call("baseline", *files, "--read-images")
    assert "dev.jsonl:1: 1: its image is not read (media: an image" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "t.jsonl").read_text())["id"] == "1"


_train = tfidf.train
