"""``guard-train synthesize`` against a real HTTP server whose teacher is scripted by words in the prompts."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from guard_middleware.guard.parse import completion, parse
from guard_training.corpus.conversation import conversation
from guard_training.process import LAUNCH
from guard_training.rowfile import OutputError
from guard_training.tuning.contract import target
from tests.support.commands import call
from tests.support.rows import read_rows

_NO_COMPLETIONS = {
    "page": ("text/html", "<html>a web page</html>"),
    "half": ("application/json", '{"choices": ['),
    "list": ("application/json", "[]"),
    "error": ("application/json", '{"error": {"message": "no provider", "code": 502}}'),
    "mute": ("application/json", '{"choices": [{"index": 0}]}'),
}


class ScriptedTeacher:
    """Answers with the verdict that the prompt states. ``[word n]`` in a prompt bends the first n answers to it."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.seconds = 0.0
        self.app = Starlette(routes=[Route("/v1/chat/completions", self._chat, methods=["POST"])])

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.times.append(time.monotonic())
        text = next(part["text"] for part in body["messages"][1]["content"] if part["type"] == "text")
        exchange = text.split("Verdict:")[0]
        self.asked[exchange] += 1
        if self.seconds:
            await asyncio.sleep(self.seconds)
        bent = re.search(r"\[([a-z]+) (\d+)\]", exchange)
        word = bent[1] if bent and self.asked[exchange] <= int(bent[2]) else ""
        if word == "busy":
            return JSONResponse({"error": {"message": "slow down"}}, 429, {"retry-after": "0.3"})
        if word in ("down", "wrong", "key", "quota"):
            status = {"down": 500, "wrong": 400, "key": 401, "quota": 429}[word]
            code = "insufficient_quota" if word == "quota" else None
            return JSONResponse({"error": {"message": word, "code": code}}, status)
        if word in _NO_COMPLETIONS:
            return Response(_NO_COMPLETIONS[word][1], media_type=_NO_COMPLETIONS[word][0])
        if word == "older" and "max_tokens" not in body:
            return JSONResponse(
                {"detail": [{"type": "extra_forbidden", "loc": ["body", "max_completion_tokens"]}]}, 422
            )
        verdict = dict(re.findall(r"^(Request|Response): (.+)$", text.split("Verdict:")[1], re.M))
        said = {side: "harmful" if label == "decide yourself" else label for side, label in verdict.items()}
        if word == "contrary":
            said["Request"] = {"harmful": "unharmful", "unharmful": "harmful"}[said["Request"]]
        thought = "The ground truth is plain." if word == "leak" else "The words were read."
        answer = f"# Task 1\n## Reasoning Step 1\n{thought}\n## Reasoning Step 2\nSo, {said['Request']}."
        if said["Response"] != "None":
            answer += f"\n# Task 2\n## Reasoning Step 1\nThe answer is {said['Response']}."
        answer += f"\nAnswers:\nRequest: {said['Request']}\nResponse: {said['Response']}"
        if word == "broken":
            answer = "I would rather chat."
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
        usage = {"prompt_tokens": 400, "completion_tokens": 100, "total_tokens": 500}
        made = {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"], "usage": usage}
        return JSONResponse({**made, "choices": [{**choice, "logprobs": None}]})


@pytest.fixture
def teacher() -> Iterator[tuple[ScriptedTeacher, str]]:
    scripted = ScriptedTeacher()
    server = uvicorn.Server(uvicorn.Config(scripted.app, port=0, log_level="error", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield scripted, f"http://127.0.0.1:{port}/v1"
    server.should_exit = True
    thread.join(5)


def rows_file(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"source": "made", **row}) + "\n" for row in rows))
    return path


def asks(number: int, word: str = "") -> list[dict[str, Any]]:
    return [
        {"id": f"r{n}", "prompt": f"question {n} {word}", "prompt_label": ("harmful", "unharmful")[n % 2]}
        for n in range(number)
    ]


def teach(rows: Path, output: Path, url: str, *more: object, yes: bool = True) -> None:
    words = ("--rows", rows, "--output", output, "--teacher", "scripted", "--base-url", url, *more)
    call("synthesize", *words, *(["--yes"] if yes else []))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


Teacher = tuple[ScriptedTeacher, str]


def test_rows_get_rationales_that_the_guards_form_takes(
    teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted, url = teacher
    rows = [
        *asks(3),
        {"id": "pair", "prompt": "hi", "prompt_label": None, "response": "Hello!", "response_label": "unharmful"},
        {"id": "seen", "prompt": "", "prompt_label": "unharmful", "image": "wide.png"},
        {"id": "done", "prompt": "p", "prompt_label": "harmful", "rationale": "It was written before."},
        {"id": "gone", "prompt": "", "prompt_label": "harmful", "image": "gone.png"},
        {"id": "void", "text": "p", "label": "harmful"},
        {"id": "odd", "prompt": "p", "prompt_label": "maybe"},
    ]
    path = rows_file(tmp_path, rows)
    Image.new("RGB", (300, 100), "red").save(path.parent / "wide.png")
    output = tmp_path / "out" / "taught.jsonl"
    teach(path, output, url, "--image-side", 150, "--price-prompt", 2, "--price-completion", 10)

    taught = {row.id: row for row in read_rows(output)}
    assert set(taught) == {"r0", "r1", "r2", "pair", "seen", "done"}
    for row in taught.values():
        assert row.rationale
        assert row.request
        written = completion(row.rationale, row.request, row.response_label)
        assert parse(written, answered=row.response is not None)
    assert taught["done"].rationale == "It was written before."
    assert (taught["pair"].request, taught["pair"].response_label) == ("harmful", "unharmful")
    made = {line["id"]: line.get("synthesis") for line in lines(output)}
    assert made["pair"] == {"teacher": "scripted", "attempts": 1, "steps": 3, "decided": ["request"]}
    assert made["r0"]["decided"] == []

    sent = [part for body in scripted.bodies for part in body["messages"][1]["content"] if part["type"] == "image_url"]
    (image,) = sent
    kind, _, data = image["image_url"]["url"].partition(";base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert (kind, picture.size) == ("data:image/jpeg", (150, 50))

    shown = capsys.readouterr().out
    assert "5 rationales written" in shown
    assert "2,000 prompt and 500 answer tokens, cost 0.01" in shown
    assert "3 rows left out" in shown
    for reason in (
        "gone: gone.png is no readable image",
        "void: nothing to judge: no prompt, response or image",
        "rows.jsonl:9: not a labelled row",
    ):
        assert reason in shown


def test_what_has_no_label_is_decided_by_the_teacher_and_can_be_trained_on(
    teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SPA-VL's rows, which have no label at all, from the copy to the guard's form; and half a label each."""
    scripted, url = teacher
    picture = io.BytesIO()
    Image.new("RGB", (60, 40), "green").save(picture, "PNG")
    questions = [f"what is in picture {number}?" for number in range(4)]
    spa_vl = [
        {"image": {"bytes": picture.getvalue()}, "question": q, "chosen": "A", "rejected": "B"} for q in questions
    ]
    parquet.write_table(pa.Table.from_pylist(spa_vl), tmp_path / "train-0.parquet")
    call("corpus", "build", "--source", f"spa_vl={tmp_path / 'train-0.parquet'}", "--output", tmp_path)
    pair = {"id": "pair", "source": "made", "prompt": "hi", "response": "Hello!", "response_label": "unharmful"}
    half = {**pair, "id": "half", "rationale": "Written of the answer alone."}
    rows, output = tmp_path / "train.jsonl", tmp_path / "taught.jsonl"
    rows.write_text(rows.read_text() + json.dumps(pair) + "\n" + json.dumps(half) + "\n")
    teach(rows, output, url)

    asked = [body["messages"][1]["content"][-1]["text"].split("Verdict:\n")[1] for body in scripted.bodies]
    assert Counter(asked) == {
        "Request: decide yourself\nResponse: decide yourself": 4,
        "Request: decide yourself\nResponse: unharmful": 2,
    }
    taught = {row.id: row for row in read_rows(output)}
    assert {row.prompt for row in taught.values() if row.source == "spa_vl"} == set(questions)
    for row in taught.values():
        read = parse(target(row, row.rationale or ""), answered=conversation(row).answer is not None)
        assert (read.request, read.response) == ("harmful", "harmful" if row.source == "spa_vl" else "unharmful")
    assert "alone" not in str(taught["half"].rationale)
    decided = {line["id"]: line["synthesis"]["decided"] for line in lines(output)}
    assert decided.pop("pair") == decided.pop("half") == ["request"]
    assert set(map(tuple, decided.values())) == {("request", "response")}
    shown = capsys.readouterr().out
    assert re.search(r"6 .* 4 .* 4 .* 1,680", shown)
    assert "labels that the teacher decided: request 6, response 4; 4 rows had none of their own" in shown


@pytest.mark.parametrize(("word", "fault"), [("broken", "form"), ("contrary", "verdict"), ("leak", "leak")])
def test_an_answer_that_is_refused_is_asked_for_again_and_told_why(
    teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, fault: str
) -> None:
    scripted, url = teacher
    teach(rows_file(tmp_path, asks(1, f"[{word} 2]")), tmp_path / "taught.jsonl", url)
    (line,) = lines(tmp_path / "taught.jsonl")
    assert line["synthesis"]["attempts"] == 3
    assert f"answers refused: {fault} 2" in capsys.readouterr().out
    said = [body["messages"][1]["content"][-1]["text"] for body in scripted.bodies]
    assert ["An earlier attempt was unusable" in text for text in said] == [False, True, True]


def test_a_row_that_never_gets_a_good_answer_is_given_up_and_only_asked_again_on_demand(
    teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted, url = teacher
    rows, output = rows_file(tmp_path, asks(2, "[broken 4]")), tmp_path / "taught.jsonl"
    teach(rows, output, url, "--attempts", 2)
    given_up = lines(tmp_path / "taught.invalid.jsonl")
    assert sorted(line["id"] for line in given_up) == ["r0", "r1"]
    assert [len(line["reasons"]) for line in given_up] == [2, 2]
    assert "2 rows given up" in capsys.readouterr().out
    teach(rows, output, url, "--attempts", 2)
    assert len(scripted.bodies) == 4
    teach(rows, output, url, "--attempts", 4, "--again")
    assert sorted(line["id"] for line in lines(output)) == ["r0", "r1"]
    assert lines(tmp_path / "taught.invalid.jsonl") == []


def test_longer_answers_are_not_mixed_with_shorter_ones(teacher: Teacher, tmp_path: Path) -> None:
    rows, output = rows_file(tmp_path, asks(2)), tmp_path / "taught.jsonl"
    teach(rows, output, teacher[1])
    with pytest.raises(OutputError, match="max_tokens"):
        teach(rows, output, teacher[1], "--max-tokens", 99)


def test_retry_after_holds_back_every_request(teacher: Teacher, tmp_path: Path) -> None:
    scripted, url = teacher
    rows = [*asks(1, "[busy 1]"), *[{**row, "id": f"o{row['id']}"} for row in asks(12)]]
    teach(rows_file(tmp_path, rows), tmp_path / "taught.jsonl", url, "--concurrency", 1)
    assert len(lines(tmp_path / "taught.jsonl")) == 13
    assert len(scripted.bodies) == 14
    assert scripted.times[1] - scripted.times[0] >= 0.3


def test_while_a_teacher_is_busy_nobody_asks(teacher: Teacher, tmp_path: Path) -> None:
    scripted, url = teacher
    scripted.seconds = 0.02
    rows = [*asks(1, "[busy 1]"), *[{**row, "id": f"o{row['id']}"} for row in asks(30)]]
    teach(rows_file(tmp_path, rows), tmp_path / "taught.jsonl", url, "--concurrency", 2)
    assert len(lines(tmp_path / "taught.jsonl")) == 31
    gaps = [later - earlier for earlier, later in zip(scripted.times, scripted.times[1:], strict=False)]
    assert max(gaps) > 0.2
    assert scripted.times.index(next(t for t, gap in zip(scripted.times, gaps, strict=False) if gap > 0.2)) <= 3


def test_a_server_error_is_repeated_and_one_that_stays_is_left_for_the_next_run(
    teacher: Teacher, tmp_path: Path
) -> None:
    _, url = teacher
    rows = [*asks(1, "[down 1]"), {"id": "never", "prompt": "[down 2]", "prompt_label": "harmful"}]
    path, output = rows_file(tmp_path, rows), tmp_path / "taught.jsonl"
    with pytest.raises(ValueError, match="1 rows were out of the teacher's reach"):
        teach(path, output, url, "--repeats", 1)
    assert [line["id"] for line in lines(output)] == ["r0"]
    assert lines(tmp_path / "taught.invalid.jsonl") == []
    teach(path, output, url, "--repeats", 1)
    assert {line["id"] for line in lines(output)} == {"r0", "never"}


def test_what_the_api_refuses_for_one_row_is_that_rows_fault(teacher: Teacher, tmp_path: Path) -> None:
    _, url = teacher
    rows = [*asks(1), {"id": "bad", "prompt": "[wrong 9]", "prompt_label": "harmful"}]
    teach(rows_file(tmp_path, rows), tmp_path / "taught.jsonl", url)
    assert lines(tmp_path / "taught.invalid.jsonl") == [{"id": "bad", "reasons": ["the API answered 400"]}]


@pytest.mark.parametrize(
    ("word", "reason", "most"),
    [("key", "check --base-url", 4), ("quota", "quota is spent", 4), ("wrong", "20 requests in a row failed", 24)],
)
def test_a_teacher_that_cannot_be_had_ends_the_run(teacher: Teacher, tmp_path: Path, word, reason, most) -> None:  # type: ignore[no-untyped-def]
    scripted, url = teacher
    path = rows_file(tmp_path, asks(60, f"[{word} 9]"))
    with pytest.raises(ValueError, match=reason):
        teach(path, tmp_path / "taught.jsonl", url, "--concurrency", 4, "--repeats", 0)
    assert len(scripted.bodies) <= most


@pytest.mark.parametrize("word", _NO_COMPLETIONS)
def test_what_is_no_completion_leaves_the_row_for_the_next_run(teacher: Teacher, tmp_path: Path, word: str) -> None:
    rows = rows_file(tmp_path, [*asks(1), {"id": "odd", "prompt": f"[{word} 1]", "prompt_label": "harmful"}])
    output = tmp_path / "taught.jsonl"
    reach = r"1 rows were out of the teacher's reach \((what came back is no chat completion|JSONDecodeError)\)"
    with pytest.raises(ValueError, match=reach):
        teach(rows, output, teacher[1])
    assert [line["id"] for line in lines(output)] == ["r0"]
    teach(rows, output, teacher[1])
    assert {line["id"] for line in lines(output)} == {"r0", "odd"}


def test_a_server_that_knows_only_the_older_name_of_the_bound_is_asked_by_it(teacher: Teacher, tmp_path: Path) -> None:
    scripted, url = teacher
    teach(rows_file(tmp_path, asks(8, "[older 99]")), tmp_path / "taught.jsonl", url, "--concurrency", 4)
    assert len(lines(tmp_path / "taught.jsonl")) == 8
    assert {body.get("max_tokens") for body in scripted.bodies[-4:]} == {1200}
    assert lines(tmp_path / "taught.invalid.jsonl") == []


def test_no_server_at_all_ends_the_run_too(tmp_path: Path) -> None:
    path = rows_file(tmp_path, asks(30))
    with pytest.raises(ValueError, match="20 requests in a row failed, the last with: APIConnectionError"):
        teach(path, tmp_path / "taught.jsonl", "http://127.0.0.1:9/v1", "--repeats", 0)


def test_requests_of_a_minute_are_bounded_repeats_included(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted, url = teacher
    monkeypatch.setattr("guard_training.synthesis.limits.WINDOW", 0.5)
    rows = rows_file(tmp_path, [*asks(1, "[down 1]"), *[{**row, "id": f"o{row['id']}"} for row in asks(5)]])
    start = time.monotonic()
    teach(rows, tmp_path / "taught.jsonl", url, "--requests-per-minute", 3)
    assert len(scripted.bodies) == 7
    # Six rows fit into two windows; the repeat needs the third.
    assert time.monotonic() - start >= 1.0


def test_a_killed_run_goes_on_and_pays_for_no_row_twice(teacher: Teacher, tmp_path: Path) -> None:
    scripted, url = teacher
    scripted.seconds = 0.1
    rows, output = rows_file(tmp_path, asks(40)), tmp_path / "taught.jsonl"
    words = ["--rows", rows, "--output", output, "--teacher", "scripted", "--base-url", url, "--concurrency", "4"]
    process = subprocess.Popen([*LAUNCH, "synthesize", *map(str, words), "--yes"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (output.exists() and output.read_bytes().count(b"\n") >= 6):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = output.read_bytes().count(b"\n")
    assert 6 <= done < 40
    scripted.seconds = 0.0
    teach(rows, output, url, "--concurrency", 4)
    assert Counter(line["id"] for line in lines(output)) == {f"r{n}": 1 for n in range(40)}
    assert 40 <= len(scripted.bodies) <= 44


def test_a_second_row_of_an_id_is_named_and_not_paid_for(
    teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted, url = teacher
    taught = {"id": "r1", "prompt": "other", "prompt_label": "harmful", "rationale": "It asks."}
    rows = rows_file(tmp_path, [*asks(2), *asks(1), taught])
    teach(rows, tmp_path / "taught.jsonl", url)
    assert sorted(line["id"] for line in lines(tmp_path / "taught.jsonl")) == ["r0", "r1"]
    assert len(scripted.bodies) == 2
    shown = capsys.readouterr().out
    assert "rows.jsonl:3: r0: a second row with this id" in shown
    assert "rows.jsonl:4: r1: a second row with this id" in shown


def test_without_a_usable_row_the_reasons_are_given(tmp_path: Path) -> None:
    rows = rows_file(tmp_path, [{"id": ""}])
    with pytest.raises(ValueError, match=r"no usable row; 1 rows left out:\n  rows\.jsonl:1: not a labelled row"):
        teach(rows, tmp_path / "taught.jsonl", "http://127.0.0.1:9/v1")
    assert not list(tmp_path.glob("taught*"))


def test_more_bad_rows_than_are_shown_are_all_named_in_a_file(
    teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_file(tmp_path, [*asks(1), *[{"id": f"b{n}", "prompt": "", "image": "no.png"} for n in range(9)]])
    teach(rows, tmp_path / "taught.jsonl", teacher[1])
    assert f"... and 4 more: {tmp_path / 'taught.skipped.txt'}" in capsys.readouterr().out
    assert (tmp_path / "taught.skipped.txt").read_text().splitlines() == [
        f"rows.jsonl:{n + 2}: b{n}: no.png is no readable image" for n in range(9)
    ]


@pytest.mark.parametrize("wrong", [("--limit", 0), ("--concurrency", 0), ("--requests-per-minute", -1)])
def test_numbers_that_mean_nothing_are_refused(tmp_path: Path, wrong: tuple[str, int]) -> None:
    with pytest.raises(SystemExit):
        teach(tmp_path / "rows.jsonl", tmp_path / "taught.jsonl", "http://127.0.0.1:9/v1", *wrong)


def test_a_dry_run_shows_the_cost_and_asks_nobody(
    teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted, url = teacher
    path = rows_file(tmp_path, [*asks(4), {"id": "i", "prompt": "", "prompt_label": "harmful", "image": "i.png"}])
    Image.new("RGB", (280, 56)).save(path.parent / "i.png")
    teach(path, tmp_path / "taught.jsonl", url, "--dry-run", yes=False)
    shown = capsys.readouterr().out
    assert re.search(r"5 .* 1 .* 1,400 .* unknown", shown)
    assert "--price-prompt" in shown
    teach(path, tmp_path / "taught.jsonl", url, "--dry-run", "--price-prompt", 0, "--price-completion", 100, yes=False)
    assert re.search(r"1,400 .* 0\.14", capsys.readouterr().out)
    assert scripted.bodies == []
    assert not (tmp_path / "taught.jsonl").exists()


def test_a_dry_run_over_what_is_no_output_of_this_command_changes_nothing(teacher: Teacher, tmp_path: Path) -> None:
    path = rows_file(tmp_path, asks(2))
    path.write_text(path.read_text().rstrip("\n"))
    before = path.read_bytes()
    teach(path, path, teacher[1], "--dry-run", yes=False)
    with pytest.raises(OutputError, match="exists and no"):
        teach(path, path, teacher[1])
    assert path.read_bytes() == before


def test_a_filter_that_refuses_many_rows_in_a_row_does_not_end_a_run_that_had_answers(
    teacher: Teacher, tmp_path: Path
) -> None:
    rows = [
        *asks(1),
        *({**row, "id": f"w{n}"} for n, row in enumerate(asks(25, "[wrong 9]"))),
        {**asks(1)[0], "id": "z"},
    ]
    output = tmp_path / "taught.jsonl"
    teach(rows_file(tmp_path, rows), output, teacher[1], "--concurrency", 1)
    assert [line["id"] for line in lines(output)] == ["r0", "z"]
    assert len(lines(tmp_path / "taught.invalid.jsonl")) == 25


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stdin", "asked", "reason"),
    [(io.StringIO(), 0, "give --yes"), (Terminal("n\n"), 0, "stopped before"), (Terminal("y\n"), 1, None)],
)
def test_somebody_must_agree_before_anything_is_asked(  # type: ignore[no-untyped-def]
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, stdin, asked, reason
) -> None:
    scripted, url = teacher
    monkeypatch.setattr("sys.stdin", stdin)
    path = rows_file(tmp_path, [*asks(1), {"id": "bare"}])
    with pytest.raises(ValueError, match=reason) if reason else contextlib.nullcontext():
        teach(path, tmp_path / "taught.jsonl", url, yes=False)
    assert len(scripted.bodies) == asked
    shown = capsys.readouterr().out
    assert "without a label" in shown
    assert "1 rows left out:\n  rows.jsonl:2: bare: nothing to judge" in shown


def test_without_a_key_openai_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    path = rows_file(tmp_path, asks(1))
    with pytest.raises(ValueError, match="no key in OPENAI_API_KEY"):
        call("synthesize", "--rows", path, "--output", tmp_path / "o.jsonl", "--teacher", "gpt", "--yes")
