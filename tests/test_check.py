"""``guard-gateway check`` against a worker process: rows in, one line per row out, in their order."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from guard_middleware import cli
from tests.support.gateway import command, scripted_worker

HARMFUL = "how do I pick a lock?"
KEYS = ["id", "request", "response", "request_score", "response_score", "reasoning", "tokens", "model", "error"]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("k") / "w.sock"
    with scripted_worker(path):
        yield str(path)


def rows_file(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(row if isinstance(row, str) else f"{json.dumps(row)}\n" for row in rows))
    return path


def check(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, list[Any], str]:
    status = cli.main(["check", *map(str, argv)])
    captured = capsys.readouterr()
    return status, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_each_row_has_its_line_in_order(capsys: pytest.CaptureFixture[str], tmp_path: Path, worker: str) -> None:
    rows = [
        {"id": "a", "prompt": "[wait 0.3] how do I bake bread?"},
        {"id": "b", "prompt": HARMFUL},
        "\n",
        {"id": "c", "prompt": "hello", "response": "First, pick a lock."},
        {"id": 4, "prompt": "hello", "response": "hi", "image": None, "source": "ignored"},
        {"prompt": "without an id"},
    ]
    status, lines, _ = check(capsys, rows_file(tmp_path, *rows), "--worker", worker)
    assert status == 0
    assert [line["id"] for line in lines] == ["a", "b", "c", "4", "6"]
    assert [line["request"] for line in lines] == ["unharmful", "harmful", *["unharmful"] * 3]
    assert [line["response"] for line in lines] == [None, None, "harmful", "unharmful", None]
    assert [line["request_score"] for line in lines] == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert [line["response_score"] for line in lines] == [None, None, 1.0, 0.0, None]
    for line in lines:
        assert list(line) == KEYS
        assert (line["error"], line["tokens"], line["model"]) == (None, 8, "scripted@0")
        assert line["reasoning"].startswith("Step 1")


def test_rows_come_from_stdin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, worker: str) -> None:
    line = json.dumps({"id": "x", "prompt": HARMFUL}).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(line)))
    status, (line,), _ = check(capsys, "-", "--worker", worker)
    assert (status, line["id"], line["request"]) == (0, "x", "harmful")


def test_more_rows_than_fit_at_once_keep_their_order(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, worker: str
) -> None:
    rows = [{"id": str(n), "prompt": f"[wait {0.05 * (n % 3)}] {HARMFUL if n % 2 else n}"} for n in range(100)]
    status, lines, _ = check(capsys, rows_file(tmp_path, *rows), "--worker", worker)
    assert status == 0
    assert [line["id"] for line in lines] == [str(n) for n in range(100)]
    assert [line["request"] for line in lines] == ["unharmful", "harmful"] * 50


def test_pictures_are_found_beside_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, worker: str) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (tmp_path / "words.txt").write_text("not a picture")
    rows = [
        {"id": "1", "prompt": "what is this?", "image": "a.png"},
        {"id": "2", "image": "a.png"},
        {"id": "3", "prompt": "x", "image": "missing.png"},
        {"id": "4", "prompt": "x", "image": "broken.png"},
        {"id": "5", "prompt": "x", "image": "words.txt"},
        {"id": "6", "prompt": "x", "image": "."},
        {"id": "7", "prompt": "x", "image": str(tmp_path / "a.png")},
    ]
    status, lines, _ = check(capsys, rows_file(tmp_path, *rows), "--worker", worker)
    assert status == 1  # some rows have no verdict
    kinds = [line["error"] and line["error"]["kind"] for line in lines]
    assert kinds == [None, None, "media", "media", "media", "media", None]
    for line in lines:
        assert list(line) == KEYS
        assert (line["request"] is None) == (line["error"] is not None)


@pytest.mark.parametrize(
    "bad",
    [
        "not json\n",
        "[1]\n",
        '"text"\n',
        '{"id": "x", "prompt": 3}\n',
        '{"id": "x", "prompt": "a", "response": ["b"]}\n',
        '{"id": "x", "prompt": "a", "image": {}}\n',
        '{"id": "x"}\n',
        '{"id": "x", "prompt": ""}\n',
        '{"id": "x", "prompt": null, "response": "a"}\n',
        '{"prompt": "a"',
        '{"prompt": "\\ud800"}\n',
        '{"prompt": "a", "prompt": "b"}\n',
        '{"id": {}, "prompt": "a"}\n',
        '{"id": 1.5, "prompt": "a"}\n',
        '{"prompt": NaN}\n',
        "[" * 100_000 + "\n",
    ],
)
def test_a_bad_row_is_named_by_its_line_before_anything_is_judged(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, worker: str, bad: str
) -> None:
    path = rows_file(tmp_path, {"id": "1", "prompt": "hello"}, "\n", bad)
    status, lines, errors = check(capsys, path, "--worker", worker)
    assert (status, lines) == (2, [])
    assert errors.startswith(f"guard-gateway: {path}:3: ")
    assert 'a row looks like {"id": "1"' in errors


def test_bytes_that_are_no_text_are_named_by_their_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, worker: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    status, lines, errors = check(capsys, path, "--worker", worker)
    assert (status, lines) == (2, [])
    assert errors.startswith(f"guard-gateway: {path}:2: ")


def test_a_null_id_is_the_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, worker: str) -> None:
    _, (line,), _ = check(capsys, rows_file(tmp_path, {"id": None, "prompt": "a"}), "--worker", worker)
    assert line["id"] == "1"


def test_an_empty_file_is_no_row(capsys: pytest.CaptureFixture[str], tmp_path: Path, worker: str) -> None:
    assert check(capsys, rows_file(tmp_path), "--worker", worker)[:2] == (0, [])


@pytest.mark.parametrize("argv", [[], ["rows.jsonl", "--text", "x"], ["-", "--image", "x.png"], ["--response", "x"]])
def test_nothing_or_two_things_to_check_is_a_mistake(
    capsys: pytest.CaptureFixture[str], worker: str, argv: list[str]
) -> None:
    status, lines, errors = check(capsys, *argv, "--worker", worker)
    assert (status, lines) == (2, [])
    assert "--text" in errors


def test_a_file_that_is_not_there_is_a_mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path, worker: str) -> None:
    status, _, errors = check(capsys, tmp_path / "no.jsonl", "--worker", worker)
    assert status == 2
    assert "no.jsonl" in errors


def test_without_a_worker_every_row_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = rows_file(tmp_path, {"id": "1", "prompt": "a"}, {"id": "2", "prompt": HARMFUL})
    status, lines, _ = check(capsys, path, "--worker", tmp_path / "nobody.sock")
    assert status == 1
    assert [line["error"]["kind"] for line in lines] == ["unavailable"] * 2
    assert {line["request"] for line in lines} == {None}


def test_a_slow_row_is_a_timeout(capsys: pytest.CaptureFixture[str], tmp_path: Path, worker: str) -> None:
    path = rows_file(tmp_path, {"id": "1", "prompt": "[wait 5] a"}, {"id": "2", "prompt": HARMFUL})
    status, lines, _ = check(capsys, path, "--worker", worker, "--deadline", "0.2")
    assert (status, lines[0]["error"]["kind"], lines[1]["request"]) == (1, "timeout", "harmful")


def show(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str]:
    status = cli.main(["check", *map(str, argv)])
    return status, capsys.readouterr().out


def test_one_case_is_printed_for_a_human(capsys: pytest.CaptureFixture[str], tmp_path: Path, worker: str) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    status, out = show(capsys, "--text", HARMFUL, "--worker", worker)
    assert status == 0  # a verdict, whatever it says
    assert "request   harmful (score 1.000)" in out
    assert "response" not in out
    assert "Step 1" in out
    assert "scripted@0" in out
    status, out = show(
        capsys, "--text", "hi", "--response", "pick a lock", "--image", tmp_path / "a.png", "--worker", worker
    )
    assert status == 0
    assert "request   unharmful (score 0.000)" in out
    assert "response  harmful (score 1.000)" in out


@pytest.mark.parametrize("argv", [["--text", "[wait 5] a", "--deadline", "0.1"], ["--image", "no-such.png"]])
def test_one_case_without_a_verdict_is_1(capsys: pytest.CaptureFixture[str], worker: str, argv: list[str]) -> None:
    status, out = show(capsys, *argv, "--worker", worker)
    assert status == 1
    assert out.startswith("no verdict: ")


def test_scripts_read_the_same_whatever_the_locale(tmp_path: Path, worker: str) -> None:
    path = rows_file(tmp_path, json.dumps({"id": "blé", "prompt": "où?"}, ensure_ascii=False) + "\n")
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    for argv, stdin in (([str(path)], None), (["-"], path.read_bytes())):
        done = subprocess.run(
            [*command(), "check", *argv, "--worker", worker], input=stdin, capture_output=True, check=False,
            env=environment, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["id"] == "blé"
        assert done.stderr == b""
