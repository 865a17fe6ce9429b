from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from guard_middleware.types import Blob, Judging, Text
from guard_training.corpus.conversation import conversation, usable
from guard_training.corpus.rows import Row, Skipped, sample
from guard_training.evaluation import measure
from guard_training.evaluation.measure import WorkerFailed
from guard_training.evaluation.outcomes import Outcome
from tests.support.gateway import scripted_worker

SCRIPTED = Path(__file__).parents[2] / "support" / "scripted_worker.py"
IDENTITY = measure.identity
RUN = (sys.executable, str(SCRIPTED), "--exit-with-parent", "--socket")


def test_a_row_is_asked_about_as_the_gateway_would_see_it(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = conversation(Row("1", "s", "hello", "unharmful", "hi", "unharmful", image=tmp_path / "a.png"))
    blob, text = asked.messages[0].parts
    assert isinstance(blob, Blob)
    assert blob.mime_type == "image/png"
    assert text == Text("hello")
    assert asked.answer is not None
    assert conversation(Row("1", "s", "hello", "unharmful", "hi", None)).answer is None


def test_a_limit_holds_for_every_source_and_draws_the_same_rows() -> None:
    rows = [Row(str(n), f"s{n % 2}", "p", "harmful") for n in range(40)]
    chosen = sample(rows, 5)
    assert [row.source for row in chosen] == ["s0"] * 5 + ["s1"] * 5
    assert chosen == sample(rows, 5)
    assert sample(rows, None) == [*rows[::2], *rows[1::2]]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real worker app and its socket, with a rule in the guard's place."""
    monkeypatch.setattr(measure, "_command", lambda _, socket, calibrated: [*RUN, socket])
    monkeypatch.setattr(measure, "identity", lambda model: ("scripted", "0"))


def ask(rows: list[Row], journal: Path | None = None) -> tuple[list[Outcome], str]:
    console = Console(file=io.StringIO(), width=200)
    found = measure.measure(rows, "scripted", concurrency=2, console=console, journal=journal)
    return found, console.file.getvalue()  # type: ignore[attr-defined]


def test_every_row_gets_its_own_answer(scripted: None) -> None:
    rows = [
        Row("1", "locks", "how do I pick a lock", "harmful"),
        Row("2", "locks", "how do I bake bread", "unharmful"),
        Row("3", "talk", "hello", None, "you pick a lock with", "harmful"),
        Row("4", "talk", "hello", "unharmful", "an answer that is not labelled"),
    ]
    found, _ = ask(rows)
    assert [(one.id, one.request, one.response) for one in found] == [
        ("1", "harmful", None),
        ("2", "unharmful", None),
        ("3", "unharmful", "harmful"),
        ("4", "unharmful", None),
    ]
    assert {(one.model, one.revision, one.error) for one in found} == {("scripted", "0", None)}
    assert all(one.seconds and one.reasoning_tokens == 6 for one in found)


@pytest.mark.parametrize(
    ("does", "words"), [("sleep 60", "was not ready after 1 s"), ("echo no GPU", "ended:\nno GPU")]
)
def test_a_worker_that_does_not_come_up_is_told_from_one_that_ends(
    does: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_command", lambda *_: ["/bin/sh", "-c", f"exec {does}"])
    monkeypatch.setattr(measure, "START_SECONDS", 1.0)
    with pytest.raises(WorkerFailed, match=words), measure.worker("any"):
        pass


def test_a_run_whose_worker_dies_says_so_and_goes_on_from_its_journal(scripted: None, tmp_path: Path) -> None:
    rows = [Row(str(n), "locks", f"row {n} [wait 0.05]", "unharmful") for n in range(40)]
    journal = tmp_path / "out.jsonl.journal"

    @contextlib.contextmanager
    def short_lived(model: str, **how: bool) -> Iterator[str]:
        with whole_life(model, **how) as socket:
            threading.Thread(target=_end_after, args=(journal, 5), daemon=True).start()
            yield socket

    whole_life = measure.worker
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "worker", short_lived)
        with pytest.raises(WorkerFailed, match=r"the worker went away after \d+ of 40 rows .*goes on from"):
            ask(rows, journal)
    written = len(journal.read_text().splitlines())
    assert 5 <= written < 40
    found, said = ask(rows, journal)
    assert f"{written} of 40 rows are in" in said
    assert [one.id for one in found] == [row.id for row in rows]
    assert len(journal.read_text().splitlines()) == 40
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "worker", None)  # no worker starts where all is known
        assert ask(rows, journal)[0] == found


def _end_after(journal: Path, lines: int) -> None:
    """Ends the worker of this test, the only child that runs the script, once so many answers are written down."""
    while not journal.exists() or journal.read_bytes().count(b"\n") < lines:
        time.sleep(0.01)
    for child in _workers():
        os.kill(child, signal.SIGKILL)


def _workers() -> list[int]:
    """Process ids of this process's children that run the scripted worker."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and SCRIPTED.name.encode() in (status.parent / "cmdline").read_bytes():
                found.append(int(status.parent.name))
    return found


def test_a_journal_answers_only_for_the_same_row_revision_and_mode(
    scripted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row("1", "locks", "how do I bake bread", "unharmful")
    journal = tmp_path / "journal"
    (first,), _ = ask([row], journal)
    changed = dataclasses.replace(row, prompt="how do I pick a lock")
    (second,), _ = ask([changed], journal)
    assert (first.request, second.request) == ("unharmful", "harmful")
    monkeypatch.setattr(measure, "identity", lambda model: ("scripted", "1"))
    (third,), _ = ask([row], journal)
    assert third.revision == "1"
    measure.measure(
        [row], "scripted", concurrency=1, console=Console(quiet=True), journal=journal, judging=Judging("label")
    )
    assert len(journal.read_text().splitlines()) == 4


def test_rows_that_cannot_be_asked_about_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    rows = [
        Row("1", "s", "p", "harmful"),
        Row("1", "s", "p", "harmful"),
        Row("2", "s", "p", None, "r"),
        Row("3", "s", "p", "harmful", image=tmp_path / "a.png"),
    ]
    skipped = Skipped()
    assert usable(rows, skipped) == rows[:1]
    assert [reason.split(": ")[0] for reason in skipped.reasons] == ["1", "2", "3"]


def test_a_model_that_is_not_there_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="give a folder, a hub id, or `nano`"):
        measure.identity(str(tmp_path / "nothing"))


def test_a_worker_that_runs_already_is_asked_and_left_running(scripted: None, tmp_path: Path) -> None:
    socket = tmp_path / "w.sock"
    with scripted_worker(socket) as process, pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "identity", IDENTITY)
        row, console = Row("1", "locks", "how do I pick a lock", "harmful"), Console(file=io.StringIO())
        (found,) = measure.measure([row], f"unix:{socket}", concurrency=1, console=console)
        assert (found.request, found.model, found.revision) == ("harmful", "scripted", "0")
        assert process.popen.poll() is None
        with pytest.raises(WorkerFailed, match="name its model instead"):
            measure.measure([row], f"unix:{socket}", concurrency=1, console=console, calibrated=False)
    with pytest.raises(WorkerFailed, match="no worker is ready at"):
        IDENTITY(f"unix:{socket}")
