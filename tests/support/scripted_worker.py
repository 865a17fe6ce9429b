"""A worker process without a model, for tests and benchmarks: the real app and socket, and a rule in the guard's place.

A text is harmful if it contains ``pick a lock``, or what ``--phrase`` says. ``[wait 0.2]`` in the request makes its
answer take 0.2 seconds; ``[unsure]`` makes a request unharmful with the score 0.4. ``--weights`` names a folder whose
``scripted.json`` may hold ``revision``, ``phrase``, the ``seconds`` of every verdict, and those to ``load``.

    python tests/support/scripted_worker.py --socket /tmp/guard.sock
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Iterable
from pathlib import Path

from guard_middleware.types import Label, Message, Reasoning, Text, ToolCall, ToolCallResponse, Usage, Verdict
from guard_middleware.wire import ModerationRequest
from guard_middleware.worker import serve
from guard_middleware.worker.app import MAX_FRAME, Worker
from guard_middleware.worker.metrics import Metrics


def text_of(messages: Iterable[Message]) -> str:
    words = []
    for message in messages:
        for part in message.parts:
            match part:
                case Text(text) | Reasoning(text) | ToolCallResponse(_, text):
                    words.append(text)
                case ToolCall(_, name, arguments):
                    words += [name, arguments]
    return "\n".join(words)


def label(text: str, phrase: str = "pick a lock") -> Label:
    return "harmful" if phrase in text.lower() else "unharmful"


class ScriptedGuard:
    def __init__(
        self, model: str = "scripted", phrase: str = "pick a lock", revision: str = "0", seconds: float = 0.0
    ) -> None:
        self.model, self._phrase, self.revision, self._seconds = model, phrase, revision, seconds

    async def moderate(self, request: ModerationRequest, deadline: float) -> Verdict:
        asked = text_of(request.conversation.messages)
        asked += "\n".join(definition.text for definition in request.conversation.definitions)
        pause = re.search(r"\[wait ([0-9.]+)\]", asked)
        if pause or self._seconds:
            await asyncio.sleep(float(pause[1]) if pause else self._seconds)
        answer = request.conversation.answer
        request_label = label(asked, self._phrase)
        response_label = None if answer is None else label(text_of([answer]), self._phrase)
        unsure = request_label == "unharmful" and "[unsure]" in asked
        return Verdict(
            request=request_label,
            response=response_label,
            request_score=0.4 if unsure else float(request_label == "harmful"),
            response_score=None if response_label is None else float(response_label == "harmful"),
            reasoning=f"Step 1: The rule says that this request is {request_label}.",
            usage=Usage(len(asked.split()), 8, 6),
            model=self.model,
            revision=self.revision,
            judging=request.judging,
        )

    def gauges(self) -> dict[str, float]:
        return {}

    def stalled(self) -> float:
        return 0.0

    async def aclose(self) -> None:
        pass


async def load(metrics: Metrics) -> ScriptedGuard:
    return ScriptedGuard()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--ws", default="websockets-sansio", help="uvicorn's WebSocket implementation")
    parser.add_argument("--model", default="scripted", help="the name in its verdicts")
    parser.add_argument("--phrase", default="pick a lock")
    parser.add_argument("--weights", type=Path, metavar="FOLDER")
    parser.add_argument("--exit-with-parent", action="store_true")
    options = parser.parse_args()
    if options.exit_with_parent:
        serve.exit_with_parent()
    serve.log_to_stderr("warning")

    async def guard(metrics: Metrics) -> ScriptedGuard:
        script = options.weights / "scripted.json" if options.weights else None
        told = json.loads(script.read_text()) if script and script.is_file() else {}
        await asyncio.sleep(told.pop("load", 0.0))
        return ScriptedGuard(options.model, **{"phrase": options.phrase, **told})

    worker = Worker(guard, on_ready=lambda guard: print("worker ready model=scripted", flush=True))
    server = serve.Server(worker.asgi, serve.unix_listener(options.socket), max_frame=MAX_FRAME, ws=options.ws)
    raise SystemExit(server.run())


if __name__ == "__main__":
    main()
