"""``guard-train evaluate`` from file to file, with the real worker app and a rule in the guard's place."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from guard_training.corpus.rows import Skipped
from guard_training.evaluation import measure
from guard_training.evaluation.outcomes import read_outcomes
from tests.support.commands import call

SCRIPTED = Path(__file__).parents[2] / "support" / "scripted_worker.py"
RUN = (sys.executable, str(SCRIPTED), "--exit-with-parent", "--socket")
SECRET = "MARKER-OF-A-ROW"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_command", lambda _, socket, calibrated: [*RUN, socket])
    monkeypatch.setattr(measure, "identity", lambda model: ("scripted", "0"))


def lines(path: Path, values: list[Any]) -> Path:
    text = "".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {
            "id": f"r{n}",
            "source": "locks" if n < 12 else "bread",
            "prompt": f"{SECRET} {n} {'pick a lock' if n % 3 == 0 else 'bake bread'}",
            "prompt_label": "harmful" if n % 2 == 0 else "unharmful",
        }
        for n in range(24)
    ]
    return lines(tmp_path / "dev.jsonl.gz", [*rows, "not a row", {**rows[0], "prompt_label": "bad"}])


def test_one_run_writes_figures_outcomes_and_report_and_names_bad_rows(
    scripted: None, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    call("evaluate", "--data", data, "--model", "any", "--json", out / "a.json", "--outcomes", out / "a.jsonl",
         "--report", out / "a.html")  # fmt: skip
    printed = capsys.readouterr().out
    summary = json.loads((out / "a.json").read_text())
    assert (summary["data"], summary["limit"], summary["rows"], summary["model"]) == (
        "dev.jsonl.gz",
        None,
        24,
        "scripted",
    )
    assert summary["outcomes"] == "a.jsonl"
    assert summary["left_out"] == 2
    assert {one["source"]: one["recall"]["value"] for one in summary["sources"]} == {"bread": 2 / 6, "locks": 2 / 6}
    assert summary["sources"][0]["scores"]["auc"]["value"] == pytest.approx(0.5)
    outcomes = read_outcomes(out / "a.jsonl", Skipped())
    assert [one.id for one in outcomes] == [f"r{n}" for n in range(24)]
    assert "2 rows left out" in printed
    assert "dev.jsonl.gz:25" in printed
    assert "mean over sources" in printed
    assert sorted(file.name for file in out.iterdir()) == ["a.html", "a.json", "a.jsonl"]
    for file in out.iterdir():
        assert SECRET not in file.read_text()
    assert SECRET not in printed


def test_categories_are_left_out_and_the_figures_say_so(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"r{n}",
            "source": "s",
            "prompt": "p",
            "prompt_label": "harmful",
            "category": ("Advice", "Fraud", None)[n],
        }
        for n in range(3)
    ]
    data = lines(tmp_path / "rows.jsonl", rows)
    said = lines(tmp_path / "said.jsonl", [{"id": f"r{n}", "request": "harmful"} for n in range(3)])
    call(
        "evaluate", "--data", data, "--predictions", f"a={said}", "--leave-out", "Advice", "--json", tmp_path / "a.json"
    )
    summary = json.loads((tmp_path / "a.json").read_text())
    assert (summary["rows"], summary["data"]) == (2, "rows.jsonl without Advice")


def test_other_guards_stand_in_the_same_table_and_against_ours(
    scripted: None, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # right about every row of the even and odd labels
    better = [{"id": f"r{n}", "request_score": 0.9 if n % 2 == 0 else 0.1} for n in range(24)]
    better_file = lines(tmp_path / "tfidf.jsonl", better)
    first = tmp_path / "old.json"
    call("evaluate", "--data", data, "--predictions", f"tfidf={better_file}", "--json", first,
         "--outcomes", tmp_path / "old.jsonl")  # fmt: skip
    assert json.loads(first.read_text())["means"]["f1"]["value"] == 1.0
    new, report = tmp_path / "new.json", tmp_path / "new.html"
    call(
        "evaluate",
        *("--data", data, "--model", "any", "--predictions", f"tfidf={better_file}"),
        *("--against", first, "--json", new, "--report", report, "--limit", "10"),
    )
    summary = json.loads(new.read_text())
    assert summary["others"]["tfidf"]["means"]["recall"]["value"] == 1.0
    assert summary["against"]["rows"] == 20
    assert summary["against"]["means"]["recall"]["difference"] < -0.3
    assert (summary["against"]["ours"], summary["against"]["theirs"]) == ("scripted 0", "tfidf")
    assert "scripted 0 minus tfidf" in report.read_text()
    assert "recall / false positives / F1" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["strict", "paper"])
def test_the_papers_benchmarks(
    scripted: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: Literal["strict", "paper"]
) -> None:
    rows = [
        {"input": f"Human user:\n{text}\n\nAI assistant:\nNone\n\n", "output": label}
        for text, label in (("pick a lock", "harmful"), ("hello", "unharmful"), ("pick a lock", "unharmful"))
    ]
    (tmp_path / "ToxicChat.json").write_text(json.dumps(rows))
    answered = [
        {"input": "Human user:\nhi\n\nAI assistant:\npick a lock\n\n", "output": "Request: None\nResponse: harmful"}
    ]
    (tmp_path / "SafeRLHF.json").write_text(json.dumps(answered))
    out, live = tmp_path / "a.json", tmp_path / "live.jsonl"
    call("evaluate", "--benchmark", tmp_path, "--model", "any", "--json", out, "--outcomes", live)
    if mode == "paper":
        capsys.readouterr()
        # the outputs of the same guard, not in the one form
        said = [
            {"id": one.id, "output": f"so: request: {one.request} response: {one.response}"}
            for one in read_outcomes(live, Skipped())
        ]
        call("evaluate", "--benchmark", tmp_path, "--predictions", f"g={lines(live, said)}", "--mode", "paper",
             "--json", out)  # fmt: skip
    summary = json.loads(out.read_text())
    assert summary["mode"] == mode
    assert summary["benchmarks"]["request"]["benchmarks"][0]["f1"] == pytest.approx(200 / 3)
    assert summary["benchmarks"]["response"]["averages"]["all"]["f1"] == 100.0
    printed = capsys.readouterr().out
    assert "GuardReasoner-VL 3B (paper)" in printed
    assert "213.3" in printed
    assert ("Read strictly" in printed) == (mode == "strict")


_DRIVER = """
from guard_training.cli import main
from guard_training.evaluation import measure
measure._command = lambda _, socket, calibrated: [*{run!r}, socket]
measure.identity = lambda model: ("scripted", "0")
raise SystemExit(main())
"""


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    rows = [
        {"id": str(n), "source": "s", "prompt": f"row {n} [wait 0.1]", "prompt_label": "unharmful"} for n in range(30)
    ]
    data, out = lines(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    journal = tmp_path / "out.jsonl.journal"
    arguments = ["evaluate", "--data", data, "--model", "any", "--outcomes", out, "--concurrency", "2"]
    command = [sys.executable, "-c", _DRIVER.format(run=RUN), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ) as killed:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and killed.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") >= 4:
                break
            time.sleep(0.02)
        assert killed.poll() is None, killed.stderr and killed.stderr.read()
        killed.send_signal(signal.SIGKILL)
    before = journal.read_bytes()
    written = before.count(b"\n")
    assert 4 <= written < 30
    assert not out.exists()
    # as if the kill had come in the middle of a line
    journal.write_bytes(before + b'{"id": "half a li')
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert f"{written} of 30 rows are in" in again.stdout
    assert f"{30 - written} are left to ask" in again.stdout
    assert [one.id for one in read_outcomes(out, Skipped())] == [str(n) for n in range(30)]
    assert not journal.exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--model", "nano"], "nothing to ask about; give --data FILE or --benchmark"),
        (["--data", "{data}"], "nobody to ask; give --model, or --predictions"),
        (["--data", "{data}", "--predictions", "x.jsonl"], "--predictions takes NAME=FILE"),
        (["--data", "{data}", "--predictions", "a={said}", "--predictions", "a={said}"], "of one name"),
        (["--data", "{data}", "--predictions", "a={said}", "--against", "{summary}"], "names no outcomes"),
        (["--data", "{data}", "--predictions", "a={said}", "--against", "{said}"], "not an outcome"),
        (["--data", "{empty}", "--model", "nano"], "no usable row"),
        (["--data", "{data}", "--model", "{folder}/nothing"], "give a folder, a hub id, or `nano`"),
        (["--benchmark", "Toxic=x.json", "--model", "nano"], "is no benchmark"),
        (["--data", "{data}", "--model", "nano", "--mode", "paper"], "leave --mode out"),
        (["--data", "{data}", "--model", "nano", "--leave-out", "Fruad"], "no row is of the category Fruad"),
    ],
)
def test_a_wrong_input_is_refused_with_the_remedy(data: Path, tmp_path: Path, arguments: list[str], why: str) -> None:
    places = {
        "data": data,
        "said": lines(tmp_path / "said.jsonl", [{"id": "r1", "request_score": 0.1}]),
        "summary": lines(tmp_path / "a.json", [{"outcomes": None}]),
        "empty": lines(tmp_path / "empty.jsonl", ["not a row"]),
        "folder": tmp_path,
    }
    with pytest.raises(ValueError, match=why):
        call("evaluate", *(one.format(**places) for one in arguments))


@pytest.mark.parametrize("option", ["--limit", "--concurrency"])
@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_a_count_below_one_is_a_wrong_command_line(
    option: str, value: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call("evaluate", "--data", data, "--model", "nano", option, value)
    assert option in capsys.readouterr().err
