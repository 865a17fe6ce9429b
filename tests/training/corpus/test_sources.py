"""Each source on a small file of its own schema, as it is published. All texts and pictures are made up."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from guard_middleware.guard.parse import completion
from guard_middleware.guard.prompt import SYSTEM, render
from guard_middleware.types import Blob, Conversation, Message, Text
from guard_training.corpus.rows import CorpusError, Row
from guard_training.corpus.sources.build import Plan, build, draw
from guard_training.corpus.sources.fields import Foreign, Unusable
from guard_training.corpus.sources.parts import Given, Part, read_part
from guard_training.corpus.sources.records import Record, open_copy
from guard_training.corpus.sources.registry import SOURCES, find
from guard_training.corpus.sources.released import guardreasoner

Raw = dict[str, Any]


def png(shade: int = 0, kind: str = "PNG", size: int = 40) -> bytes:
    """A small picture with stripes; another shade is another picture."""
    image = Image.new("RGB", (size, size), (shade, 90, 200))
    for x in range(0, size, 4 + shade % 7):
        image.paste((255 - shade, x, 0), (x, 0, x + 2, size))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def to_parquet(path: Path, rows: list[Raw]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def to_csv(path: Path, rows: list[Raw]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def to_jsonl(path: Path, rows: Iterable[Raw]) -> None:
    put(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read(name: str, place: Path | str, folder: Path, images: tuple[Path, ...] = ()) -> Part:
    folder.mkdir(exist_ok=True)
    return read_part(Given(find(name), str(place), images), folder)


def rows(name: str, place: Path | str, folder: Path) -> list[Row]:
    return read(name, place, folder).rows


# ---------------------------------------------------------------- text

WILDGUARD = {
    "adversarial": False,
    "response_refusal_label": "compliance",
    "prompt_harm_label": "unharmful",
    "subcategory": "benign",
}
AEGIS = {"id": "1", "text_type": "user_message"} | {f"labels_{number}": None for number in range(5)}
TOXIC = {"model_output": "Sure.", "human_annotation": True, "jailbreaking": 0, "openai_moderation": "[]"}


def test_wildguard_keeps_its_labels_and_rows_of_a_prompt_alone(tmp_path: Path) -> None:
    to_parquet(
        tmp_path / "copy" / "train" / "wildguard_train.parquet",
        [
            {**WILDGUARD, "prompt": "bake bread", "response": "Knead.", "response_harm_label": "unharmful"},
            {
                **WILDGUARD,
                "prompt": "pick a lock",
                "prompt_harm_label": "harmful",
                "response": None,
                "response_harm_label": None,
            },
        ],
    )
    to_parquet(tmp_path / "copy" / "test" / "wildguard_test.parquet", [{**WILDGUARD, "prompt": "test row"}])
    first, second = rows("wildguard", tmp_path / "copy", tmp_path / "out")
    assert first == Row(
        "wildguard:copy/train/wildguard_train.parquet:1", "wildguard", "bake bread", "unharmful", "Knead.", "unharmful",
        "benign", "ODC-BY",
    )  # fmt: skip
    assert (second.prompt, second.request, second.response, second.response_label) == (
        "pick a lock",
        "harmful",
        None,
        None,
    )


@pytest.mark.parametrize(
    ("votes", "expected", "category"),
    [
        (["Safe", "Safe", "Violence"], "unharmful", None),
        (["Safe", "Violence", "Violence"], "harmful", "Violence"),
        (["Needs Caution", "Needs Caution", "Safe"], "harmful", "Needs Caution"),
        (["Safe", "Violence"], "unharmful", None),
        (["Violence, Threat", "Safe"], "harmful", "Violence, Threat"),
    ],
)
def test_aegis_goes_by_the_most_frequent_annotation(
    tmp_path: Path, votes: list[str], expected: str, category: str
) -> None:
    given = {**AEGIS, "text": "a film scene", "num_annotations": len(votes)}
    given |= {f"labels_{number}": vote for number, vote in enumerate(votes)}
    to_parquet(tmp_path / "train.parquet", [given])
    (row,) = rows("aegis", tmp_path / "train.parquet", tmp_path / "out")
    assert (row.prompt, row.request, row.response, row.category) == ("a film scene", expected, None, category)


def test_beavertails_labels_the_answer_only(tmp_path: Path) -> None:
    category = {"privacy_violation": True, "animal_abuse": False, "violence": True}
    given = [
        {"prompt": "p", "response": "bad", "category": category, "is_safe": False},
        {"prompt": "p", "response": "good", "category": dict.fromkeys(category, False), "is_safe": True},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in given).encode()
    put(tmp_path / "b" / "round0" / "30k" / "train.jsonl.gz", gzip.compress(lines))
    put(tmp_path / "b" / "round0" / "30k" / "test.jsonl.gz", gzip.compress(lines))
    found = rows("beavertails", tmp_path / "b", tmp_path / "out")
    assert [(row.request, row.response, row.response_label, row.category) for row in found] == [
        (None, "bad", "harmful", "privacy_violation, violence"),
        (None, "good", "unharmful", None),
    ]


def test_toxicchat_takes_rows_that_a_human_annotated(tmp_path: Path) -> None:
    to_csv(
        tmp_path / "data" / "0124" / "toxic-chat_annotation_train.csv",
        [
            {**TOXIC, "conv_id": "a", "user_input": "hello,\nyou", "toxicity": 0},
            {**TOXIC, "conv_id": "b", "user_input": "x" * 200_000, "toxicity": 1, "jailbreaking": 1},
            {**TOXIC, "conv_id": "c", "user_input": "machine", "toxicity": 0, "human_annotation": False},
        ],
    )
    part = read("toxicchat", tmp_path, tmp_path / "out")
    assert [(len(row.prompt), row.request, row.response, row.category) for row in part.rows] == [
        (10, "unharmful", None, None),
        (200_000, "harmful", None, "jailbreak"),
    ]
    assert part.foreign == {"not annotated by a human": 1}
    assert part.bad == []


# ---------------------------------------------------------------- images


def test_unsafebench_as_parquet_with_the_images_inside(tmp_path: Path) -> None:
    given = [
        {
            "image": {"bytes": png(1, "JPEG"), "path": None},
            "safety_label": "Safe",
            "category": "Hate",
            "source": "Laion5B",
        },
        {
            "image": {"bytes": png(2), "path": "b.png"},
            "safety_label": "Unsafe",
            "category": "Shocking",
            "source": "Lexica",
        },
        {"image": {"bytes": b"no image", "path": None}, "safety_label": "Safe", "category": "Hate", "source": "Lexica"},
    ]
    to_parquet(tmp_path / "u" / "data" / "train-00000-of-00001.parquet", given)
    part = read("unsafebench", tmp_path / "u", tmp_path / "out")
    assert [(row.prompt, row.request, row.category) for row in part.rows] == [
        ("", "unharmful", "Hate"),
        ("", "harmful", "Shocking"),
    ]
    assert [row.image.suffix for row in part.rows if row.image] == [".jpg", ".png"]
    assert [row.image.read_bytes() for row in part.rows if row.image] == [given[0]["image"]["bytes"], png(2)]
    assert part.bad == [
        "unsafebench:u/data/train-00000-of-00001.parquet:3: its image cannot be decoded (UnidentifiedImageError)"
    ]


def test_an_image_folder_of_datasets_and_one_sorted_by_label_read_alike(tmp_path: Path) -> None:
    put(tmp_path / "a" / "one.png", png(3))
    to_csv(
        tmp_path / "a" / "metadata.csv",
        [{"file_name": "one.png", "safety_label": "Unsafe", "category": "", "source": ""}],
    )
    put(tmp_path / "b" / "Unsafe" / "one.png", png(3))
    named, (sorted_,) = (rows("unsafebench", tmp_path / copy, tmp_path / "out") for copy in "ab")
    assert [(named[0].request, named[0].image)] == [(sorted_.request, sorted_.image)] == [("harmful", named[0].image)]


def test_badnews_goes_by_the_code_of_the_ad(tmp_path: Path) -> None:
    columns = (
        "ad_id,landing_page_id,name,sample_type,page_type,parent_url,landing_url,ad_platform,ad_platform_type,"
        "ad_screenshot,page_screenshot"
    )
    ads = [
        "Content Farm",
        "Charities and PSAs",
        "Supplements",
        "Self Links",
        "Product Advertorials",
        "Products and Services",
    ]
    lines = [
        f"{n},,{name},news,home,,,Google,Display,screenshots/{n}.png,external/{n}.png" for n, name in enumerate(ads)
    ]
    lines += ["9,,Charities and PSAs,news,home,,,,,,", "10,,Mystery,news,home,,,,,screenshots/0.png,"]
    put(tmp_path / "ads" / "dataset.csv", "\n".join([columns, *lines]).encode())
    for number in range(len(ads)):
        put(tmp_path / "ads" / "screenshots" / f"{number}.png", png(number))
    part = read("badnews", tmp_path / "ads", tmp_path / "out")
    assert [row.request == "harmful" for row in part.rows] == [True, False, True, False, True, False]
    assert part.rows[0].category == "content farm"
    assert part.bad == [
        "badnews:ads/dataset.csv:8: column 'ad_screenshot' holds no image",
        "badnews:ads/dataset.csv:9: column 'name' has no code of the code book",
    ]


def vlguard(tmp_path: Path) -> Path:
    folders = ["bad_ads/1.png", "hateful_memes/2.png", "hateful_memes/3.png", "harm-p/4.png", "privacyAlert/5.png"]
    table = []
    for number, image in enumerate(folders):
        put(tmp_path / "VLGuard" / "train" / image, png(number))
        safe = number in (2, 4)
        turns = [{"safe_instruction": "s", "response": "r"}] if safe else [{"instruction": "i", "response": "r"}]
        harm = {} if safe else {"harmful_category": "discrimination", "harmful_subcategory": "other"}
        table.append({"id": f"x_{number}", "image": image, "safe": safe, **harm, "instr-resp": turns})
    put(tmp_path / "VLGuard" / "train.json", json.dumps(table).encode())
    put(tmp_path / "VLGuard" / "test.json", json.dumps(table).encode())
    return tmp_path / "VLGuard"


@pytest.mark.parametrize(
    ("name", "expected", "elsewhere"),
    [
        ("hateful_memes", [("harmful", "other"), ("unharmful", None)], {"bad_ads", "harm-p", "privacyAlert"}),
        ("hateful_p_memes", [("harmful", "other")], {"bad_ads", "hateful_memes", "privacyAlert"}),
    ],
)
def test_memes_come_out_of_vlguards_one_table(
    tmp_path: Path, name: str, expected: list[tuple[str, str | None]], elsewhere: set[str]
) -> None:
    part = read(name, vlguard(tmp_path), tmp_path / "out")
    assert [(row.request, row.category) for row in part.rows] == expected
    assert set(part.foreign) == {f"folder {folder} of VLGuard" for folder in elsewhere}
    assert all(row.prompt == "" and row.image and row.image.exists() for row in part.rows)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("hateful_memes", {"id": 1, "img": "img/1.png", "label": 1, "text": "drawn"}, "harmful"),
        ("hateful_memes", {"id": 1, "img": "img/1.png", "label": 0, "text": "drawn"}, "unharmful"),
        ("hateful_p_memes", {"id": "m", "image": "img/1.png", "labels": ["not harmful"], "text": "drawn"}, "unharmful"),
        ("hateful_p_memes", {"id": "m", "image": "img/1.png", "labels": ["very harmful", "individual"]}, "harmful"),
    ],
)
def test_memes_also_read_as_their_authors_publish_them(tmp_path: Path, name: str, given: Raw, expected: str) -> None:
    put(tmp_path / "img" / "1.png", png())
    to_jsonl(tmp_path / "train.jsonl", [given])
    (row,) = rows(name, tmp_path / "train.jsonl", tmp_path / "out")
    assert (row.prompt, row.request) == ("", expected)


def test_hod_is_read_from_its_folders_of_categories_once(tmp_path: Path) -> None:
    hod = tmp_path / "HOD-Benchmark-Dataset" / "dataset"
    for place in (
        "class/alcohol/hard_cases/jpg/a.jpg",
        "class/insulting_gesture/normal_cases/jpg/b.jpg",
        "all/jpg/a.jpg",
    ):
        put(hod / place, png(len(place), "JPEG"))
    put(hod / "class" / "other" / "c.jpg", png(5, "JPEG"))
    put(hod / "class" / "alcohol" / "hard_cases" / "xml" / "a.xml", b"<annotation/>")
    part = read("hod", hod.parent, tmp_path / "out")
    assert [(row.request, row.category) for row in part.rows] == [
        ("harmful", "alcohol"),
        ("harmful", "insulting_gesture"),
    ]
    assert len(part.bad) == 1
    assert "class/other/c.jpg: in no folder of a category" in part.bad[0]


def test_spa_vl_saved_to_disk_gives_one_unlabelled_row_for_each_question(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            **{name: datasets.Value("string") for name in ("question", "chosen", "rejected", "image_name")},
        }
    )
    answers = {"chosen": "yes", "rejected": "no"}
    given: list[Raw] = [
        {"image": {"bytes": png(n), "path": f"{n}.png"}, "question": f"what is in {n}?", "image_name": f"{n}.png"}
        | answers
        for n in range(20)
    ]
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(given, features=features)})
    saved.save_to_disk(str(tmp_path / "spa"))
    found = rows("spa_vl", tmp_path / "spa", tmp_path / "out")
    assert [(row.prompt, row.request, row.response_label) for row in found] == [
        (raw["question"], None, None) for raw in given
    ]
    assert {row.response for row in found} == {"yes", "no"}
    assert [row.image.read_bytes() for row in found if row.image] == [raw["image"]["bytes"] for raw in given]
    saved["train"].save_to_disk(str(tmp_path / "alone"))
    alone = rows("spa_vl", tmp_path / "alone", tmp_path / "out")
    assert [(row.prompt, row.response, row.image) for row in alone] == [
        (row.prompt, row.response, row.image) for row in found
    ]
    datasets.DatasetDict({"validation": saved["train"]}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(CorpusError, match="no split 'train', only validation"):
        rows("spa_vl", tmp_path / "other", tmp_path / "out")


# ---------------------------------------------------------------- the released corpora


def sharegpt(asked: str, assistant: str, *images: str) -> Raw:
    roles = (("system", SYSTEM), ("user", asked), ("assistant", assistant))
    messages = [{"role": role, "content": content} for role, content in roles]
    return {"messages": messages, "images": list(images)} if images else {"messages": messages}


def user(prompt: str, response: str = "None") -> str:
    return f"Human user:\n{prompt}\n\nAI assistant:\n{response}\n"


VERDICT = (
    "<think>\n# Task 1\n## Reasoning Step 1\nfine.\n</think>\n<result>\nAnswers: \nRequest: {}\nResponse: {}\n</result>"
)
RATIONALE = "# Task 1\n## Reasoning Step 1\nfine."
THOUGHT = f"<think>\n{RATIONALE}\n</think>"


def test_vltrain_gives_all_three_modalities(tmp_path: Path) -> None:
    put(tmp_path / "v" / "image" / "1.png", png())
    to_jsonl(
        tmp_path / "v" / "GuardReasoner-VLTrainMixed.jsonl",
        [
            sharegpt(user("bake", "Knead.\n"), VERDICT.format("unharmful", "unharmful")),
            sharegpt(user("<image>"), VERDICT.format("harmful", "None"), "./image/1.png"),
            sharegpt(user("<image>\nwhat?", "A cat."), VERDICT.format("None", "harmful"), "image/1.png"),
        ],
    )
    text, image, both = rows("guardreasoner_vltrain", tmp_path / "v", tmp_path / "out")
    assert (text.prompt, text.request, text.response, text.response_label) == (
        "bake",
        "unharmful",
        "Knead.",
        "unharmful",
    )
    assert (image.prompt, image.request, image.response, image.response_label) == ("", "harmful", None, None)
    assert (both.prompt, both.request, both.response, both.response_label) == ("what?", None, "A cat.", "harmful")
    assert text.image is None
    assert image.image == both.image
    assert {row.rationale for row in (text, image, both)} == {RATIONALE}


@pytest.mark.parametrize(
    "output",
    [
        f"{RATIONALE}\n\n---\n\nAnswers: \nRequest: harmful\nCompletion: refusal\nResponse: unharmful\n",
        f"{THOUGHT}\n<result>\nAnswers:\nRequest: Harmful\nCompletion: refusal\nResponse: harmless\n</result>",
        f"{RATIONALE}\n<result>\n**Answers:** \nRequest: harmful\nResponse: unharmful\n</result>",
        f"{THOUGHT}\nAnswers: \nRequest: none\nResponse: none\n\nAnswers: \nRequest: harmful\nResponse: unharmful",
    ],
)
def test_answers_of_the_teacher_are_read_loosely(output: str) -> None:
    found = guardreasoner({"instruction": "i", "input": "Human user:\np\n\nAI assistant:\nr\n\n", "output": output})
    assert (found.request, found.response_label, found.rationale) == ("harmful", "unharmful", RATIONALE)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (sharegpt(user("p"), "no idea"), "no Answers"),
        (sharegpt("hello", VERDICT.format("harmful", "None")), "no transcript"),
        (sharegpt(user("p"), VERDICT.format("harmful", "None"), "a", "b"), "2 images"),
        (sharegpt(user("p"), VERDICT.format("harmful", "None"), "a"), "no <image>"),
        ({"messages": [{"role": "user", "content": "p"}]}, "not system, user and assistant"),
        ({"messages": "x"}, "not a list"),
        ({"input": "p"}, "no transcript|no column 'output'"),
    ],
)
def test_a_released_row_of_another_form_is_named(record: Raw, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        guardreasoner(record)


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(
        st.characters(codec="utf-8", exclude_characters="\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), min_size=1
    ),
    response=st.none() | st.text(st.characters(codec="utf-8", categories=["L", "N", "Zs"]), min_size=1),
    pictured=st.booleans(),
)
def test_what_the_guard_is_asked_reads_back_as_the_row(prompt: str, response: str | None, pictured: bool) -> None:
    if (
        response == "None"
        or "AI assistant:" in prompt
        or not prompt.strip("\n")
        or prompt[0] in "[|"
        or "<image>" in prompt
    ):
        return
    blob = (Blob("image/png", b"x"),) if pictured else ()
    answer = Message("assistant", (Text(response),)) if response else None
    transcript = render(Conversation((Message("user", (*blob, Text(prompt))),), answer=answer))
    if "| " in transcript.text():
        return
    output = completion("fine.", "unharmful", "harmful" if response else None)
    found = guardreasoner(sharegpt(transcript.text(), output, *(["1.png"] if pictured else [])))
    assert (found.prompt, found.response) == (prompt, response)
    assert (found.request, found.response_label, found.rationale) == (
        "unharmful",
        "harmful" if response else None,
        "fine.",
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
COLUMNS = """
prompt response prompt_harm_label response_harm_label text labels_0 category is_safe safe user_input human_annotation
toxicity image safety_label name ad_screenshot instr-resp label labels img folders question chosen rejected messages
images input output
""".split()


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=40, deadline=None)
@given(record=st.dictionaries(st.sampled_from(COLUMNS), JSON, max_size=8))
def test_a_reader_makes_a_row_or_gives_a_reason_whatever_comes(name: str, record: Raw) -> None:
    try:
        found = SOURCES[name].read(record)
    except (Unusable, Foreign):
        return
    assert isinstance(found.prompt, str)
    assert {found.request, found.response_label} <= {"harmful", "unharmful", None}


# ---------------------------------------------------------------- copies


def test_a_source_from_the_hub_asks_for_its_configuration_split_and_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(*what: Any, **how: Any) -> datasets.Dataset:
        asked.append((what, how))
        features = datasets.Features(
            {"image": datasets.Image(), "safety_label": datasets.Value("string"), "category": datasets.Value("string")}
        )
        return datasets.Dataset.from_list(
            [{"image": {"bytes": png(), "path": None}, "safety_label": "Safe", "category": "Hate"}], features=features
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    (row,) = rows("unsafebench", "hub:abc123", tmp_path)
    assert asked == [(("yiting/UnsafeBench", None), {"split": "train", "revision": "abc123"})]
    assert (row.id, row.request) == ("unsafebench:hub@abc123/yiting/UnsafeBench/train:1", "unharmful")

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        CorpusError, match=r"yiting/UnsafeBench: cannot be had from the hub \(ConnectionError\); accept"
    ):
        rows("unsafebench", "hub", tmp_path)
    with pytest.raises(CorpusError, match=r"hod cannot be read straight from the hub: download and unpack github"):
        rows("hod", "hub", tmp_path)


def test_the_released_corpus_from_the_hub_finds_its_images_in_the_folder_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "unzipped" / "image" / "1.png", png())
    given = sharegpt(user("<image>"), VERDICT.format("harmful", "None"), "./image/1.png")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, **__: datasets.Dataset.from_list([given]))
    monkeypatch.chdir(tmp_path / "unzipped")
    with pytest.raises(CorpusError, match="its image is not in the copy"):
        rows("guardreasoner_vltrain", "hub", tmp_path / "out")
    part = read("guardreasoner_vltrain", "hub", tmp_path / "out", (tmp_path / "unzipped",))
    place = "guardreasoner_vltrain:hub/yueliu1999/GuardReasoner-VLTrain"
    assert [row.id for row in part.rows] == [f"{place}/{split}:1" for split in ("image", "text", "text_image")]


GOOD = {"prompt": "p", "response": "r", "category": {}, "is_safe": True}


def test_bad_records_are_named_by_file_and_line_and_the_good_go_on(tmp_path: Path) -> None:
    lines = [json.dumps(GOOD), "{cut", "", "[1]", json.dumps({**GOOD, "is_safe": "maybe"}), json.dumps({"prompt": "p"})]
    put(tmp_path / "train.jsonl", "\n".join([*lines, json.dumps({**GOOD, "prompt": "q"})]).encode())
    part = read("beavertails", tmp_path / "train.jsonl", tmp_path / "out")
    assert [row.prompt for row in part.rows] == ["p", "q"]
    place = "beavertails:train.jsonl/train.jsonl"
    assert part.bad == [
        f"{place}:2: not JSON, or cut off",
        f"{place}:4: not a JSON object",
        f"{place}:5: column 'is_safe' is neither true nor false",
        f"{place}:6: no column 'response' (it has prompt)",
    ]


def test_a_csv_row_of_another_length_is_named(tmp_path: Path) -> None:
    header = "conv_id,user_input,human_annotation,toxicity"
    put(tmp_path / "t.csv", f"{header}\na,hello,True,0\nb,short\nc,long,True,0,1\n".encode())
    part = read("toxicchat", tmp_path / "t.csv", tmp_path / "out")
    assert [row.prompt for row in part.rows] == ["hello"]
    assert [reason.rpartition("t.csv:")[2] for reason in part.bad] == [
        "3: another number of columns than its header",
        "4: another number of columns than its header",
    ]


@pytest.mark.parametrize("image", ["../secret.png", "missing.png", "/etc/hostname"])
def test_an_image_outside_the_copy_is_not_read(tmp_path: Path, image: str) -> None:
    put(tmp_path / "secret.png", png())
    put(tmp_path / "deep" / "copy" / "img" / "ok.png", png(9))
    table = [{"id": 1, "img": "img/ok.png", "label": 0}, {"id": 2, "img": image, "label": 1}]
    to_jsonl(tmp_path / "deep" / "copy" / "train.jsonl", table)
    part = read("hateful_memes", tmp_path / "deep" / "copy", tmp_path / "out")
    assert len(part.rows) == 1
    assert "its image is not in the copy" in part.bad[0]


def test_images_may_lie_in_another_folder_that_is_named(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "img" / "1.png", png())
    to_jsonl(tmp_path / "c" / "d" / "train.jsonl", [{"id": 1, "img": "img/1.png", "label": 0}])
    part = read("hateful_memes", tmp_path / "c" / "d", tmp_path / "out", (tmp_path / "elsewhere",))
    assert len(part.rows) == 1


def test_images_that_are_unpacked_later_are_found_by_the_same_command(tmp_path: Path) -> None:
    put(tmp_path / "img" / "1.png", png(1))
    to_jsonl(tmp_path / "train.jsonl", [{"id": n, "img": f"img/{n}.png", "label": 0} for n in (1, 2)])
    assert len(read("hateful_memes", tmp_path / "train.jsonl", tmp_path / "out").bad) == 1
    put(tmp_path / "img" / "2.png", png(2))
    part = read("hateful_memes", tmp_path / "train.jsonl", tmp_path / "out")
    assert (len(part.rows), part.bad) == (2, [])


def test_an_image_of_another_format_becomes_png(tmp_path: Path) -> None:
    put(tmp_path / "img" / "1.gif", png(1, "GIF"))
    to_jsonl(tmp_path / "train.jsonl", [{"id": 1, "img": "img/1.gif", "label": 0}])
    (row,) = rows("hateful_memes", tmp_path / "train.jsonl", tmp_path / "out")
    assert row.image is not None
    with Image.open(row.image) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("file", "data", "place", "reason"),
    [
        ("c/x", b"", "d", "no such file or folder"),
        ("c/test.jsonl", b"{}", "c", "none of the files to train on"),
        ("c/train.jsonl", b"\n", "c/train.jsonl", "no row to use .* it is empty"),
        (
            "c/train.jsonl",
            b'{"a": 1}',
            "c/train.jsonl",
            r"no row to use .*train.jsonl:1: no column 'prompt' \(it has a\)",
        ),
        ("c/train.xls", b"", "c/train.xls", "neither .jsonl, .json"),
        ("c/train.json", b'[{"a": 1}', "c/train.json", "is the file complete"),
        ("c/train.json", b'{"a": 1}', "c/train.json", "not one list of records"),
    ],
)
def test_a_copy_without_rows_to_train_on_is_refused(
    tmp_path: Path, file: str, data: bytes, place: str, reason: str
) -> None:
    put(tmp_path / file, data)
    with pytest.raises(CorpusError, match=reason):
        rows("beavertails", tmp_path / place, tmp_path / "out")


def test_a_byte_that_is_no_utf8_spoils_one_row_of_a_table(tmp_path: Path) -> None:
    lines = [b"id,text,text_type,labels_0", b"1,one,u,Safe", b"2,caf\xe9,u,Safe", "3,caf\xe9,u,Safe".encode()]
    part = read("aegis", put(tmp_path / "train.csv", b"\n".join(lines)), tmp_path / "out")
    assert [row.prompt for row in part.rows] == ["one", "caf\xe9"]
    assert part.bad == ["aegis:train.csv/train.csv:3: not UTF-8"]


def test_a_table_is_read_up_to_the_page_that_is_broken(tmp_path: Path) -> None:
    to_parquet(
        tmp_path / "whole.parquet", [{**GOOD, "category": {"a": True}, "prompt": f"p{n} " * 50} for n in range(500)]
    )
    data = bytearray((tmp_path / "whole.parquet").read_bytes())
    data[200:400] = random.Random(0).randbytes(200)
    put(tmp_path / "train.parquet", bytes(data))
    with pytest.raises(CorpusError, match=r"train\.parquet:end: the file is broken or cut off"):
        rows("beavertails", tmp_path / "train.parquet", tmp_path / "out")


def test_text_that_is_no_unicode_is_named_and_not_written(tmp_path: Path) -> None:
    put(tmp_path / "train.jsonl", json.dumps(GOOD).encode() + b"\n" + json.dumps({**GOOD, "prompt": "\ud800"}).encode())
    part = read("beavertails", tmp_path / "train.jsonl", tmp_path / "out")
    assert len(part.rows) == 1
    assert "half of a surrogate pair" in part.bad[0]


@settings(max_examples=30, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_under_a_known_ending_are_records_or_a_named_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for ending in (".jsonl", ".json", ".csv"):
        copy = put(folder / f"train{ending}", data)
        with suppress(CorpusError):
            assert all(record.where for record in open_copy(copy, (), ()).records)


def test_an_unknown_source_is_answered_with_the_known() -> None:
    with pytest.raises(CorpusError, match="no source 'wildgard'; the sources are wildguard, aegis"):
        find("wildgard")


# ---------------------------------------------------------------- going on after a kill


def counted(seen: list[str]) -> Callable[[Iterable[Record], int | None, str], Iterable[Record]]:
    def watch(records: Iterable[Record], total: int | None, name: str) -> Iterable[Record]:
        for record in records:
            seen.append(record.where)
            yield record

    return watch


def test_a_copy_read_to_its_end_is_opened_again_only_when_it_changes(tmp_path: Path) -> None:
    copy, seen = tmp_path / "train.jsonl", list[str]()
    to_jsonl(copy, [GOOD])
    given = Given(find("beavertails"), str(copy))
    first = read_part(given, tmp_path, counted(seen))
    assert read_part(given, tmp_path, counted(seen)) == first
    assert seen == ["train.jsonl:1"]
    to_jsonl(copy, [GOOD, {**GOOD, "prompt": "q"}])
    assert len(read_part(given, tmp_path, counted(seen)).rows) == 2
    assert seen == ["train.jsonl:1", "train.jsonl:1", "train.jsonl:2"]


def test_a_part_that_was_cut_off_goes_on_behind_its_last_whole_row(tmp_path: Path) -> None:
    copy = tmp_path / "train.jsonl"
    to_jsonl(copy, [{**GOOD, "prompt": f"p{number}"} for number in range(6)])
    given = Given(find("beavertails"), str(copy))

    def stop(records: Iterable[Record], total: int | None, name: str) -> Iterable[Record]:
        for number, record in enumerate(records):
            if number == 3:
                raise KeyboardInterrupt
            yield record

    with pytest.raises(KeyboardInterrupt):
        read_part(given, tmp_path, stop)
    part = tmp_path / "part-beavertails-train.jsonl.jsonl"
    written = part.read_bytes()
    assert written.count(b"\n") == 3
    part.write_bytes(written[:-10])
    assert [row.prompt for row in read_part(given, tmp_path).rows] == [f"p{number}" for number in range(6)]


# ---------------------------------------------------------------- the corpus


def part(*found: Row) -> Part:
    return Part(list(found), [], Counter())


def numbered(source: str, count: int) -> list[Row]:
    return [
        Row(f"{source}:{n}", source, f"{source} question number {n} about bread", "unharmful") for n in range(count)
    ]


def test_shares_are_exact_and_do_not_depend_on_other_sources() -> None:
    plan = Plan(seed=7, shares={"hod": 0.6, "spa_vl": 0.5})
    alone = build({"hod": [part(*numbered("hod", 50))]}, Plan(seed=7, shares={"hod": 0.6}))
    both = build({"spa_vl": [part(*numbered("spa_vl", 20))], "hod": [part(*numbered("hod", 50))]}, plan)
    assert [row.id for row in alone.train] == [row.id for row in both.train if row.source == "hod"]
    assert [(name, count.train) for name, count in both.counts.items()] == [("spa_vl", 10), ("hod", 30)]
    assert draw([str(n) for n in range(50)], 0.6, 1) != draw([str(n) for n in range(50)], 0.6, 2)


def test_a_share_outside_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        build({"hod": [part(*numbered("hod", 2))]}, Plan(shares={"hod": 60.0}))


def test_no_image_is_trained_on_that_looks_like_one_held_out(tmp_path: Path) -> None:
    pictures = []
    for number in range(24):
        image = Image.effect_noise((12, 12), 90).resize((160, 160), Image.Resampling.NEAREST)
        for kind in ("png", "jpg"):
            path = tmp_path / f"{number}.{kind}"
            image.save(path)
            pictures.append(Row(f"{number}.{kind}", "hod", "", "harmful", image=path))
    built = build({"hod": [part(*pictures)]}, Plan(image_test=0.5))
    trained, tested = ({row.id.split(".")[0] for row in found} for found in (built.train, built.test))
    assert len(built.test) == 24
    assert trained
    assert not trained & tested
    assert len(built.train) + len(built.too_alike) == 24


def test_the_paper_takes_half_of_the_text_60_percent_of_hod_and_half_of_spa_vl() -> None:
    shares = {name: source.share for name, source in SOURCES.items()}
    halves = ("wildguard", "aegis", "beavertails", "toxicchat", "spa_vl", "guardreasoner_train")
    assert {name for name in shares if shares[name] == 0.5} == set(halves)
    assert shares["hod"] == 0.6
    assert shares["unsafebench"] == shares["badnews"] == shares["hateful_memes"] == shares["hateful_p_memes"] == 1.0
