"""``guard-train corpus`` from its command line to the files that it leaves. All rows are made up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from guard_training.commands.corpus import LeaksFound
from guard_training.corpus.rows import CorpusError
from guard_training.corpus.sources.registry import SOURCES
from guard_training.process import LAUNCH
from tests.support.commands import call
from tests.support.rows import read_rows


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (64, 64), (200, number % 256, 40))
    pencil = ImageDraw.Draw(image)
    for place in range(6):
        x, y = (number * 7 + place * 13) % 50, (number * 11 + place * 29) % 50
        pencil.rectangle(
            (x, y, x + 5 + (number * 3 + place) % 14, y + 9), fill=(place * 40, 255 - place * 40, number % 256)
        )
    image.save(path)


def beavertails(path: Path, count: int, start: int = 0) -> Path:
    lines = [
        {"prompt": f"question {n} of {n * n}", "response": f"answer {n}", "category": {}, "is_safe": n % 2 == 0}
        for n in range(start, start + count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def hod(folder: Path, count: int) -> Path:
    for number in range(count):
        picture(folder / "class" / "knife" / "hard_cases" / "jpg" / f"{number:03d}.png", number)
    return folder


def evaluation_set(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text(
        "".join(json.dumps({"id": f"dev-{n}", "source": "dev", **row}) + "\n" for n, row in enumerate(rows))
    )
    return path


def test_a_corpus_is_built_from_several_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = beavertails(tmp_path / "train.jsonl", 20)
    text.write_text(text.read_text() + "{cut\n" + text.read_text().splitlines()[0] + "\n")
    images = hod(tmp_path / "hod", 10)
    dev = evaluation_set(tmp_path / "dev.jsonl", {"prompt": "Question 3 of 9!", "prompt_label": "unharmful"})
    build = ("build", "--source", f"beavertails={text}", "--source", f"hod={images}", "--output", tmp_path / "out")
    call("corpus", *build, "--against", dev, "--paper-shares", "--seed", 3)
    train, test = (read_rows(tmp_path / "out" / name) for name in ("train.jsonl", "harm_image_test.jsonl"))
    # 20 rows less 1 leak, halved; 10 images, 60 %, of which 20 % are the test
    assert [sum(row.source == name for row in train) for name in ("beavertails", "hod")] == [10, 5]
    assert [row.source for row in test] == ["hod"]
    assert "question 3 of 9" not in {row.prompt for row in train}
    assert all(row.image and row.image.exists() for row in test)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["counts"]["beavertails"] == {
        "read": 21, "bad": 1, "foreign": {}, "duplicates": 1, "leaks": 1, "train": 10, "test": 0,
    }  # fmt: skip
    assert [(leak["id"], leak["other"], leak["kind"]) for leak in report["leaks"]] == [
        ("beavertails:train.jsonl/train.jsonl:4", "dev-0", "text exact")
    ]
    assert [duplicate["first"] for duplicate in report["duplicates"]] == ["beavertails:train.jsonl/train.jsonl:1"]
    shown = capsys.readouterr().out
    assert "1 rows left out:\n  beavertails:train.jsonl/train.jsonl:21: not JSON, or cut off" in shown
    assert "question" not in shown + (tmp_path / "out" / "report.json").read_text()


def test_the_same_command_gives_the_same_corpus_and_another_seed_another(tmp_path: Path) -> None:
    build = (
        "build",
        "--source",
        f"beavertails={beavertails(tmp_path / 'train.jsonl', 30)}",
        "--share",
        "beavertails=0.5",
    )
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        call("corpus", *build, "--output", tmp_path / name, "--seed", seed)
    first, again, other = ((tmp_path / name / "train.jsonl").read_text() for name in "abc")
    assert first == again != other
    assert first.count("\n") == 15


def test_leaks_can_be_reported_and_kept(tmp_path: Path) -> None:
    text = beavertails(tmp_path / "train.jsonl", 4)
    dev = evaluation_set(tmp_path / "dev.jsonl", {"prompt": "question 3 of 9"})
    call("corpus", "build", "--source", f"beavertails={text}", "--output", tmp_path / "out", "--against", dev,
         "--keep-leaks")  # fmt: skip
    assert len(read_rows(tmp_path / "out" / "train.jsonl")) == 4
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["leaks"]) == 1


def test_a_build_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    count = 400
    images, out = hod(tmp_path / "hod", count), tmp_path / "out"
    command = [*LAUNCH, "corpus", "build", "--source", f"hod={images}", "--output", str(out)]
    part, environment = out / "part-hod-hod.jsonl", {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (part.exists() and part.read_bytes().count(b"\n") >= 20):
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline, "did not start"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    before = part.read_bytes()
    assert 20 <= before.count(b"\n") < count
    assert not (out / "train.jsonl").exists()
    call("corpus", "build", "--source", f"hod={images}", "--output", out)
    after = part.read_bytes()
    assert after.startswith(before[: before.rfind(b"\n") + 1])
    assert [row.id for row in read_rows(part)] == [
        f"hod:hod/class/knife/hard_cases/jpg/{n:03d}.png" for n in range(count)
    ]
    assert len(read_rows(out / "train.jsonl")) == count


def test_check_names_leaks_by_id_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = evaluation_set(tmp_path / "train.jsonl", {"prompt": "how to bake a loaf"}, {"prompt": "how to ride"})
    dev = evaluation_set(tmp_path / "dev.jsonl", {"prompt": "How to bake a loaf?"})
    with pytest.raises(LeaksFound, match="1 of 2 training rows are in an evaluation set; --output FILE"):
        call("corpus", "check", "--train", train, "--against", dev, "--json", tmp_path / "leaks.json")
    assert json.loads((tmp_path / "leaks.json").read_text()) == [
        {"id": "dev-0", "other": "dev-0", "where": "dev.jsonl", "kind": "text exact", "similarity": 1.0}
    ]
    shown = capsys.readouterr().out
    assert "dev-0 = dev-0" in shown
    assert "loaf" not in shown


def test_check_writes_the_rows_that_do_not_leak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "a.png", 1)
    train = evaluation_set(
        tmp_path / "train.jsonl",
        {"prompt": "how to bake a loaf"},
        {"prompt": "what?", "image": "a.png"},
        {"prompt": "", "image": "gone.png"},
        {"prompt": "ride", "prompt_label": "bad"},
    )
    dev = evaluation_set(tmp_path / "dev.jsonl", {"prompt": "How to bake a loaf?"})
    call("corpus", "check", "--train", train, "--against", dev, "--output", tmp_path / "clean.jsonl",
         "--cache", tmp_path / "prints")  # fmt: skip
    assert [row.id for row in read_rows(tmp_path / "clean.jsonl")] == ["dev-1"]
    assert "2 rows left out:\n  train.jsonl:4: " in capsys.readouterr().out
    assert (tmp_path / "prints").read_text().count("\n") == 1
    call("corpus", "check", "--train", train, "--against", dev, "--output", tmp_path / "elsewhere" / "clean.jsonl")
    (moved,) = read_rows(tmp_path / "elsewhere" / "clean.jsonl")
    assert moved.image
    assert moved.image.read_bytes() == (tmp_path / "a.png").read_bytes()


def test_the_papers_benchmarks_are_evaluation_sets_as_they_are_released(tmp_path: Path) -> None:
    folder, pictures = tmp_path / "benchmarks", tmp_path / "pictures" / "HarmImageTest"
    folder.mkdir()
    asked = "Human user:\n{}\n\nAI assistant:\nNone\n"
    toxic = [{"input": asked.format("how to bake a loaf"), "output": "unharmful"}]
    (folder / "ToxicChat.json").write_text(json.dumps(toxic))
    block = "Answers:\nRequest: harmful\nResponse: None"
    messages = [{"role": "user", "content": asked.format("<image>")}, {"role": "assistant", "content": block}]
    (folder / "HarmImageTest.json").write_text(json.dumps([{"messages": messages, "images": ["./image/0.png"]}]))
    for path in (pictures / "0.png", tmp_path / "own.png"):
        picture(path, 7)
    train = evaluation_set(
        tmp_path / "train.jsonl", {"prompt": "How to bake a loaf?"}, {"prompt": "look", "image": "own.png"}
    )
    check = ("check", "--train", train, "--json", tmp_path / "leaks.json", "--output", tmp_path / "clean.jsonl")
    call("corpus", *check, "--against", folder, "--against-images", tmp_path / "pictures")
    assert [
        (leak["where"], leak["other"], leak["kind"]) for leak in json.loads((tmp_path / "leaks.json").read_text())
    ] == [
        ("ToxicChat.json", "ToxicChat:0", "text exact"),
        ("HarmImageTest.json", "HarmImageTest:0", "image exact"),
    ]
    call("corpus", *check, "--against", folder / "ToxicChat.json")
    assert len(json.loads((tmp_path / "leaks.json").read_text())) == 1
    with pytest.raises(CorpusError, match=r"HarmImageTest\.json: no row to compare with: .* its picture is not in"):
        call("corpus", *check, "--against", folder)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ('[{"input": "how to bake", "output": "harmful"}]', r"dev\.jsonl: no row to compare with: dev\.jsonl:1: not a"),
        ("", r"dev\.jsonl: no row to compare with$"),
        (None, "no ToxicChat.json, .* in it; name its files"),
    ],
)
def test_an_evaluation_set_that_could_find_no_leak_is_refused(tmp_path: Path, written: str | None, reason: str) -> None:
    train, dev = evaluation_set(tmp_path / "train.jsonl", {"prompt": "how to bake"}), tmp_path / "dev.jsonl"
    dev.mkdir() if written is None else dev.write_text(written)
    with pytest.raises(CorpusError, match=reason):
        call("corpus", "check", "--train", train, "--against", dev)


def test_stats_prints_tables_and_writes_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = evaluation_set(
        tmp_path / "a.jsonl", {"prompt": "p", "prompt_label": "harmful", "rationale": "Step 1: a\nStep 2: b"}
    )
    call("corpus", "stats", rows, "--json", tmp_path / "stats.json")
    assert json.loads((tmp_path / "stats.json").read_text())["steps"][0] == {
        "modality": "text", "samples": 1, "steps": 2, "mean_steps": 2.0, "mean_length": 1.0,
    }  # fmt: skip
    assert "Modalities and reasoning steps" in capsys.readouterr().out


def test_sources_lists_every_source_with_its_licence_and_label_rule(tmp_path: Path) -> None:
    call("corpus", "sources", "--json", tmp_path / "sources.json")
    listed = {line["name"]: line for line in json.loads((tmp_path / "sources.json").read_text())}
    paper = "wildguard aegis beavertails toxicchat unsafebench badnews hateful_memes hateful_p_memes hod spa_vl"
    assert {*paper.split(), "guardreasoner_vltrain"} <= set(listed) == set(SOURCES)
    assert all(line["licence"] and line["home"] and len(line["rule"]) > 60 for line in listed.values())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--source", "beavertails"], "NAME=COPY"),
        (["--source", "beaver=x"], "no source 'beaver'"),
        (["--source", "beavertails=gone.jsonl"], "no such file or folder"),
        (["--source", "badnews=hub"], "badnews cannot be read straight from the hub: download and unpack github.com"),
        (
            ["--source", "hateful_memes=hub"],
            "download and unpack huggingface.co/datasets/ys-zong/VLGuard",
        ),
        (["--source", "aegis=a/t.csv", "--source", "aegis=b/t.csv"], "two copies of aegis are called t.csv"),
        (["--source", "aegis=a.csv", "--share", "aegis=half"], "NAME=PART"),
        (["--source", "aegis=a.csv", "--share", "hod=0.5"], "no --source of that name"),
    ],
)
def test_a_command_that_cannot_work_says_what_to_change(tmp_path: Path, arguments: list[str], reason: str) -> None:
    with pytest.raises(CorpusError, match=reason):
        call("corpus", "build", *arguments, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    "wrong",
    [
        ("--share", "beavertails=1.5"),
        ("--image-test", 2),
        ("--near-duplicates", 0),
        ("--near-duplicates", 7),
        ("--threshold", 0),
    ],
)
def test_a_share_or_similarity_that_means_nothing_is_refused_before_a_copy_is_read(
    tmp_path: Path, wrong: tuple[str, float]
) -> None:
    text = beavertails(tmp_path / "train.jsonl", 2)
    with pytest.raises(ValueError, match=r"between 0 and 1|above 0 and is at most 1"):
        call("corpus", "build", "--source", f"beavertails={text}", "--output", tmp_path / "out", *wrong)
    assert not list((tmp_path / "out").glob("part-*"))
