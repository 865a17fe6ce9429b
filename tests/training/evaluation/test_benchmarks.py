from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import f1_score

from guard_training.corpus.rows import Skipped
from guard_training.evaluation.benchmarks import (
    BENCHMARKS,
    BenchmarkError,
    fetch_images,
    find,
    label,
    paper_table,
    read_benchmark,
    split,
)
from guard_training.evaluation.outcomes import Outcome, blank
from guard_training.evaluation.published import PUBLISHED


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def _text(prompt: str, output: str | None, response: str = "None") -> dict[str, Any]:
    return {"input": f"Human user:\n{prompt}\n\nAI assistant:\n{response}\n\n", "output": output}


def _block(request: str, response: str) -> str:
    return f"Answers: \nRequest: {request}\nResponse: {response}\n"


def _picture_row(text: str, answer: str, image: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"You are a classifier.\n\nHuman user:\n<image>{text}"},
            {"role": "assistant", "content": answer},
        ],
        "images": [image],
    }


def test_plain_labels(tmp_path: Path) -> None:
    rows = [_text("hello", "unharmful"), _text("bye", "harmful"), _text("hm", None), {"input": "no header"}]
    rows += [{"input": 5, "output": "harmful"}, _text("hi", 1)]  # type: ignore[arg-type]
    skipped = Skipped()
    found = read_benchmark(BENCHMARKS["ToxicChat"], _write(tmp_path / "ToxicChat.json", rows), skipped)
    assert [(row.id, row.source, row.prompt, row.request, row.response) for row in found] == [
        ("ToxicChat:0", "ToxicChat", "hello", "unharmful", None),
        ("ToxicChat:1", "ToxicChat", "bye", "harmful", None),
    ]
    assert skipped.reasons == [f"ToxicChat.json: row {number}: not of its form" for number in (3, 4, 5)]


def test_blocks_count_for_the_files_own_task_and_none_is_unharmful(tmp_path: Path) -> None:
    rows = [_text("p", _block("None", "harmful"), "r"), _text("p", _block("harmful", "None"), "r\nr")]
    found = read_benchmark(BENCHMARKS["SafeRLHF"], _write(tmp_path / "a.json", rows), Skipped())
    assert [(row.request, row.response, row.response_label) for row in found] == [
        (None, "r", "harmful"),
        (None, "r\nr", "unharmful"),
    ]
    rows = [_text("p", _block("harmful", "unharmful"))]
    (row,) = read_benchmark(BENCHMARKS["WildGuardTestPrompt"], _write(tmp_path / "b.json", rows), Skipped())
    assert (row.request, row.response_label) == ("harmful", None)


def test_a_label_of_an_answer_that_is_not_there_is_named(tmp_path: Path) -> None:
    skipped = Skipped()
    file = _write(tmp_path / "a.json", [_text("p", "harmful")])
    assert read_benchmark(BENCHMARKS["HarmBenchResponse"], file, skipped) == []
    assert "labels an answer that is not there" in skipped.reasons[0]


def test_pictures_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "SPA_VL_Eval").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "SPA_VL_Eval" / "12.png")
    answer = _block("harmful", "Harmless")
    rows = [
        _picture_row("\nlook\n\nAI assistant:\nI see.\n", answer, "./SPA_VL_Eval/12.png"),
        _picture_row("\nlook\n\nAI assistant:\nI see.\n", answer, "../12.png"),
    ]
    skipped = Skipped()
    (row,) = read_benchmark(BENCHMARKS["SPA_VL_Eval"], _write(tmp_path / "x.json", rows), skipped)
    assert (row.prompt, row.response, row.request, row.response_label) == ("look", "I see.", "harmful", "unharmful")
    assert row.image == (tmp_path / "SPA_VL_Eval" / "12.png").resolve()
    assert "its picture is not in" in skipped.reasons[0]


def test_pictures_of_the_hubs_data_set_come_in_the_order_of_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in the layout of the published data set: label 0 and 1 are its two folders."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for folder, shades in (("HarmImageTest", (10, 20)), ("SPA_VL_Eval", (200, 210, 220))):
        (tmp_path / "hub" / "test" / folder).mkdir(parents=True)
        for number, shade in enumerate(shades):
            Image.new("L", (8, 8), shade).save(tmp_path / "hub" / "test" / folder / f"{number:04d}.png")
    images = fetch_images(str(tmp_path / "hub"), tmp_path / "cache")
    assert fetch_images("not looked at again", tmp_path / "cache") == images
    rows = [
        _picture_row("\n\nAI assistant:\nNone\n", _block("harmful", "None"), f"./HarmImageTest/{n}_x.jpg") for n in "74"
    ]
    file = _write(tmp_path / "HarmImageTest.json", rows)
    found = read_benchmark(BENCHMARKS["HarmImageTest"], file, Skipped(), images=images)
    shades = [Image.open(row.image).getpixel((0, 0)) for row in found if row.image]
    assert shades == [10, 20]
    assert [(row.prompt, row.response, row.response_label) for row in found] == [("", None, None)] * 2


def test_a_place_without_images_says_so(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="no data set of images"):
        fetch_images(str(tmp_path / "nothing"), tmp_path / "cache")


@given(st.text(max_size=40), st.text(min_size=1, max_size=40))
def test_a_transcript_is_split_where_it_was_joined(prompt: str, response: str) -> None:
    assert split(f"Human user:\n{prompt}\n\nAI assistant:\nNone\n\n") == (prompt, None)
    if "\n\nAI assistant:\n" not in f"{prompt}\n\n" and response.strip() not in ("", "None"):
        found = split(f"Human user:\n{prompt}\n\nAI assistant:\n{response}\n")
        assert found == (prompt, response.rstrip("\n"))


def test_a_header_inside_a_prompt_stays_in_the_prompt() -> None:
    prompt = "say it\n\nAI assistant:\nNone of that"
    assert split(f"Human user:\n{prompt}\n\nAI assistant:\nNone\n") == (prompt, None)
    with pytest.raises(ValueError, match="does not start"):
        split("hello")
    with pytest.raises(ValueError, match="no header of the answer"):
        split("Human user:\nhello")


def test_a_label_that_is_none_of_the_words_is_refused() -> None:
    assert label(" Harmful\n", "request") == "harmful"
    assert label(None, "request") is None
    with pytest.raises(ValueError, match="no label of the response"):
        label("Request: harmful", "response")


def test_names_and_folders(tmp_path: Path) -> None:
    for name in ("ToxicChat", "BeaverTails", "other"):
        _write(tmp_path / f"{name}.json", [])
    assert [one.name for one, _ in find([str(tmp_path)])] == ["ToxicChat", "BeaverTails"]
    assert find([f"SafeRLHF={tmp_path / 'x.json'}"]) == [(BENCHMARKS["SafeRLHF"], tmp_path / "x.json")]
    with pytest.raises(BenchmarkError, match="is no benchmark; give one of ToxicChat"):
        find(["Toxic=x.json"])
    with pytest.raises(BenchmarkError, match=r"ToxicChat\.json and the like"):
        find([str(tmp_path / "empty")])


@pytest.mark.parametrize("content", ["{}", "not json"])
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(BenchmarkError, match="as the authors released it"):
        read_benchmark(BENCHMARKS["ToxicChat"], tmp_path / "a.json", Skipped())


def _answered(name: str, pairs: list[tuple[str, str | None]]) -> list[Outcome]:
    start = dataclasses.replace(_BLANK, source=name)
    return [
        dataclasses.replace(start, id=f"{name}:{n}", request_label=truth, request=said)  # type: ignore[arg-type]
        for n, (truth, said) in enumerate(pairs)
    ]


_BLANK = Outcome("", "", "text", None, None)


def test_the_papers_average_weighs_by_labels_and_a_failure_is_the_opposite() -> None:
    toxic = [("harmful", "harmful")] * 3 + [("unharmful", None)] * 1 + [("unharmful", "unharmful")] * 2
    simple = [("harmful", "harmful")] * 1 + [("harmful", None)] * 1
    table = paper_table(_answered("ToxicChat", toxic) + _answered("SimpleSafetyTests", simple), "paper")
    assert table is not None
    side = table["request"]
    opposite = {"harmful": "unharmful", "unharmful": "harmful"}
    expected = [
        100 * f1_score([t for t, _ in rows], [p or opposite[t] for t, p in rows], pos_label="harmful")
        for rows in (toxic, simple)
    ]
    assert [one["f1"] for one in side["benchmarks"]] == pytest.approx(expected)
    assert side["averages"]["text"]["f1"] == pytest.approx((6 * expected[0] + 2 * expected[1]) / 8)
    assert not side["averages"]["text"]["complete"]
    assert "response" not in table
    assert paper_table(_answered("locks", toxic), "paper") is None


def test_the_published_averages_follow_from_the_published_figures() -> None:
    """Holds the table against a slip of the pen: the paper's averages are label-weighted means of its columns."""
    for side in ("request", "response"):
        weights = {one.name: one.rows for one in BENCHMARKS.values() if side in one.sides}
        images = {one.name for one in BENCHMARKS.values() if one.hub_label is not None}
        checked = 0
        for figures in PUBLISHED[side].values():  # type: ignore[index]
            if not weights.keys() <= figures.keys():
                continue
            for average, names in (("all", weights.keys()), ("text", weights.keys() - images)):
                total = sum(weights[name] for name in names)
                mean = sum(figures[name] * weights[name] for name in names) / total
                assert mean == pytest.approx(figures[average], abs=0.05)
            checked += 1
        assert checked == 5
    assert sum(len(one.sides) for one in BENCHMARKS.values()) == 14


def test_a_benchmark_row_is_a_row_like_any_other(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.json", [_text("p", "harmful", "r")])
    (row,) = read_benchmark(BENCHMARKS["XSTestReponseHarmful"], file, Skipped())
    assert blank(row).response_label == "harmful"
