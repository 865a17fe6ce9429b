from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from guard_middleware.audit import SCHEMA, AuditLog
from guard_middleware.errors import ConfigError
from guard_middleware.evidence import ContentDigest, Redactor
from guard_middleware.types import Action, Basis, Conversation, Message, Text
from tests.support.records import ANSWER, CONVERSATION, IMAGE, MARKER, call, record, verdict

KEY = b"k" * 32


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_one(path: Path, *, changes: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    log = AuditLog(path, **options)
    log.write(record(**(changes or {})), trace_id="ab" * 16)
    log.close()
    (line,) = lines(path)
    return line


def test_one_record_is_one_line_with_everything_that_proves_the_decision(tmp_path: Path) -> None:
    digest = ContentDigest(KEY)
    line = write_one(tmp_path / "log", digest=digest)
    assert line["schema"] == SCHEMA
    assert (line["id"], line["trace_id"], line["outcome"], line["status"]) == ("gd-1", "ab" * 16, "allowed", 200)
    assert (line["policy"], line["policy_digest"], line["hmac_key"]) == ("default", "p1", digest.key_id)
    assert line["content"] == {
        "input": digest.input(CONVERSATION),
        "answers": [digest.answer(ANSWER)],
        "images": [digest.blob(CONVERSATION.blobs()[0])],
    }
    assert line["guard_calls"] == 2
    assert line["bypassed"] == []
    assert line["timings"] == {"hold_back": 0.5, "upstream": 1.5}
    judged_input, judged_output = line["decisions"]
    assert (judged_input["source"], judged_input["action"], judged_input["basis"]) == ("input", "allow", "verdict")
    assert judged_output["verdict"] == {
        "request": "unharmful",
        "response": "harmful",
        "request_score": 0.25,
        "response_score": 0.75,
        "categories": ["burglary"],
        "reasoning": "The user asks about locks. Mild.",
        "model": "nano",
        "revision": "r1",
        "tokens": {"prompt": 120, "completion": 40, "reasoning": 30},
        "drawn_text_chars": [len(f"drawn {MARKER}")],
        "timings": {"queue": 0.001, "generate": 0.004},
        "mode": "reason",
        "thought": True,
        "cached": False,
        "left_out": {},
        "ignored": [],
    }


def test_a_streamed_answer_says_how_it_left(tmp_path: Path) -> None:
    streamed = {"stream_mode": "async", "outcome": "blocked", "released_characters": 80, "leaked_characters": 30}
    line = write_one(tmp_path / "log", changes=streamed)
    assert (line["stream_mode"], line["stream_ending"]) == ("async", "cut")
    assert (line["released_characters"], line["leaked_characters"]) == (80, 30)
    whole = write_one(tmp_path / "whole")
    assert (whole["stream_mode"], whole["stream_ending"]) == (None, None)


def test_no_raw_content_is_written_by_default(tmp_path: Path) -> None:
    write_one(tmp_path / "log")
    text = (tmp_path / "log").read_text()
    assert MARKER not in text
    assert CONVERSATION.blobs()[0].digest not in text  # an unkeyed digest could be looked up


def test_captured_content_is_redacted_and_its_images_stay_digests(tmp_path: Path) -> None:
    digest = ContentDigest(KEY)
    line = write_one(tmp_path / "log", digest=digest, capture_content=True)
    assert MARKER in line["captured"]["input"]["messages"][1]["parts"][0]["content"]
    assert line["captured"]["drawn_text"] == [f"drawn {MARKER}"]
    assert line["captured"]["input"]["messages"][1]["parts"][1]["digest"] == digest.blob(CONVERSATION.blobs()[0])
    assert IMAGE.decode("latin-1") not in (tmp_path / "log").read_text("latin-1")

    write_one(tmp_path / "redacted", capture_content=True, redactor=Redactor([(MARKER, "[marker]")]))
    assert MARKER not in (tmp_path / "redacted").read_text()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, f'It says "{MARKER}". Mild.'),
        ({"redactor": Redactor([('"[^"]+"', "[quote]")])}, "It says [quote]. Mild."),
        ({"reasoning": False}, None),
    ],
)
def test_the_reasoning_is_kept_through_the_rules_unless_switched_off(
    tmp_path: Path, options: dict[str, Any], expected: str | None
) -> None:
    calls = (call("input", verdict(reasoning=f'It says "{MARKER}". Mild.')),)
    line = write_one(tmp_path / "log", changes={"calls": calls}, **options)
    assert line["decisions"][0]["verdict"]["reasoning"] == expected


def test_a_verdict_always_sits_in_a_guard_call_that_has_an_id(tmp_path: Path) -> None:
    for index, changes in enumerate(
        (
            {},
            {"calls": (call("input", action=Action.BLOCK),), "outcome": "guard_error", "status": 503},
            {"calls": (), "outcome": "rejected", "status": 413, "error": "body_too_large", "conversation": None},
        )
    ):
        line = write_one(tmp_path / str(index), changes=changes)
        assert line["guard_calls"] == len(line["decisions"])
        assert "verdict" not in line
        for made in line["decisions"]:
            assert made["id"]
            assert (made["verdict"] is not None) == (made["basis"] == "verdict")


def test_a_guard_error_is_recorded_as_such_and_its_passing_as_a_bypass(tmp_path: Path) -> None:
    line = write_one(tmp_path / "log", changes={"calls": (call("input"), call("output", verdict("output")))})
    assert (line["decisions"][0]["basis"], line["decisions"][0]["error"]) == (Basis.ERROR, "timeout")
    assert line["decisions"][0]["verdict"] is None
    assert line["bypassed"] == [{"source": "input", "reason": "on_error"}]


def test_without_a_key_the_record_says_that_its_digests_are_ephemeral(tmp_path: Path) -> None:
    assert write_one(tmp_path / "log")["hmac_key"] == "ephemeral"


def test_nothing_in_a_record_can_forge_a_line(tmp_path: Path) -> None:
    forged = 'x\n{"outcome":"allowed"}\r\u2028\x00\x1b[2J\ud800'
    judged = verdict(reasoning=forged, categories=(forged,))
    changes = {"path": forged, "model": forged, "tenant": forged, "error": forged, "calls": (call("input", judged),)}
    log = AuditLog(tmp_path / "log", capture_content=True)
    log.write(record(**changes, conversation=Conversation((Message("user", (Text(forged),)),))))
    log.close()
    data = (tmp_path / "log").read_bytes()
    assert data.count(b"\n") == 1
    assert not any(byte < 0x20 for byte in data[:-1])
    assert json.loads(data)["path"] == forged


def test_without_a_path_nothing_is_written_or_started() -> None:
    before = threading.active_count()
    log = AuditLog(None)
    log.write(record())
    assert threading.active_count() == before
    asyncio.run(log.aclose())
    assert (log.written, log.lost) == (0, 0)


def test_a_path_that_cannot_be_opened_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="decision log"):
        AuditLog(tmp_path / "missing" / "log")


def test_the_log_is_private_to_its_owner(tmp_path: Path) -> None:
    write_one(tmp_path / "log")
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_every_line_written_before_an_orderly_shutdown_is_there_once(tmp_path: Path) -> None:
    async def run() -> None:
        log = AuditLog(tmp_path / "log")

        async def one(index: int) -> None:
            await asyncio.sleep(0)
            log.write(record(id=f"gd-{index}"))

        await asyncio.gather(*(one(index) for index in range(500)))
        await log.aclose()
        assert (log.written, log.lost) == (500, 0)

    asyncio.run(run())
    assert sorted(line["id"] for line in lines(tmp_path / "log")) == sorted(f"gd-{n}" for n in range(500))


def test_a_closed_log_counts_what_comes_too_late(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log")
    log.close()
    log.write(record())
    assert (log.written, log.lost) == (0, 1)


def _fill(path: str, name: str) -> None:
    log = AuditLog(path)
    for index in range(200):
        log.write(record(id=f"{name}-{index}"))
    log.close()


def test_processes_share_a_file_without_mixing_lines(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fill, args=(str(tmp_path / "log"), name)) for name in ("a", "b")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len({line["id"] for line in lines(tmp_path / "log")}) == 400


def wait_for(log: AuditLog, written: int) -> None:
    deadline = time.monotonic() + 10
    while log.written < written and time.monotonic() < deadline:
        time.sleep(0.005)
    assert log.written == written


@pytest.mark.parametrize("rotate", ["rename", "remove", "truncate"])
def test_a_rotated_file_is_followed(tmp_path: Path, rotate: str) -> None:
    path = tmp_path / "log"
    log = AuditLog(path)
    log.write(record(id="before"))
    wait_for(log, 1)
    match rotate:
        case "rename":
            path.rename(tmp_path / "log.1")
        case "remove":
            path.unlink()
        case "truncate":
            os.truncate(path, 0)
    log.write(record(id="after"))
    log.close()
    assert [line["id"] for line in lines(path)] == ["after"]
    if rotate == "rename":
        assert [line["id"] for line in lines(tmp_path / "log.1")] == ["before"]


def test_a_full_disk_costs_lines_and_one_warning_but_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog("/dev/full")
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            log.write(record())
        log.close()
    assert (log.written, log.lost) == (0, 5)
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    assert MARKER not in caplog.text


def test_a_line_torn_by_a_full_disk_does_not_spoil_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, path = os.write, tmp_path / "log"
    calls = iter([lambda fd, data: real(fd, data[:7]), _no_space])

    def write(fd: int, data: bytes) -> int:
        return next(calls, real)(fd, data)

    log = AuditLog(path)
    monkeypatch.setattr("guard_middleware.audit.os.write", write)
    log.write(record(id="torn"))
    log.write(record(id="whole"))
    log.close()
    torn, whole = path.read_text().splitlines()
    assert len(torn) == 7
    assert json.loads(whole)["id"] == "whole"
    assert (log.written, log.lost) == (1, 1)


def _no_space(fd: int, data: bytes) -> int:
    raise OSError(28, "No space left on device")


def test_a_disk_that_hangs_blocks_no_writer_and_bounds_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    real = os.write
    monkeypatch.setattr("guard_middleware.audit.os.write", lambda fd, data: (free.wait(), real(fd, data))[1])
    size = len(AuditLog(None).line(record()))
    log = AuditLog(tmp_path / "log", max_pending_bytes=size * 10)
    started = time.monotonic()
    for _ in range(100):
        log.write(record())
    assert time.monotonic() - started < 30  # the disk hangs for ever
    assert 85 <= log.lost <= 95
    log.close(timeout=0.05)
    lost = log.lost
    assert lost + log.written >= 99
    free.set()


def test_a_record_that_cannot_be_written_down_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog(tmp_path / "log")
    log.write(record(timings=(("x", object()),)))
    log.write(record())
    log.close()
    assert (log.written, log.lost) == (1, 1)
    assert "TypeError" in caplog.text
