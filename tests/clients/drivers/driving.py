"""What every Python driver shares: jobs in on standard input, one line of JSON per job out.

Runs in interpreters that know nothing of this project, so it imports nothing of it. A driver is a table of calls; each
puts into ``Seen`` what an application could show of the answer, piece by piece, and lets exceptions pass.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Job:
    """One call: ``go`` is an address to fetch as soon as something was seen of the answer."""

    id: str
    call: str
    model: str
    prompt: str
    url: str
    headers: dict[str, str]
    go: str


@dataclass
class Seen:
    """What the caller has of an answer; ``finish`` is the reason that the SDK names, ``marks`` are annotations."""

    job: Job
    text: str = ""
    finish: str | None = None
    marks: list[str] = field(default_factory=list)

    def say(self, piece: str | None) -> None:
        if piece and not self.text and self.job.go:
            urllib.request.urlopen(self.job.go).read()
        self.text += piece or ""

    def end(self, reason: str | None) -> None:
        self.finish = reason or self.finish

    def mark(self, name: str, present: object) -> None:
        if present and name not in self.marks:
            self.marks.append(name)


Call = Callable[[Job, Seen], Any]


def main(calls: dict[str, Call]) -> None:
    """Does every job of standard input, one after the other; one event loop serves all of them."""
    jobs = [Job(**job) for job in json.load(sys.stdin)]
    with asyncio.Runner() as runner:
        for job in jobs:
            print("result", json.dumps(runner.run(_do(calls[job.call], job))), flush=True)


async def _do(call: Call, job: Job) -> dict[str, Any]:
    seen, error = Seen(job), None
    try:
        result = call(job, seen)
        if inspect.isawaitable(result):
            await result
    except Exception as raised:
        error = _error(raised)
    said = {"text": seen.text, "finish": seen.finish, "marks": sorted(seen.marks)}
    return {"id": job.id, **said, "error": error}


def _error(raised: Exception) -> dict[str, Any]:
    """The exception as an application can tell it apart: its class, status and code."""
    code = getattr(raised, "error_code", None) or getattr(raised, "code", None)
    return {
        "type": type(raised).__name__,
        "status": getattr(raised, "status_code", None),
        "code": str(code) if code else None,
        "message": str(raised)[:600],
    }
