"""The scripted worker with eyes: besides ``pick a lock``, a picture that is mostly red is harmful.

``[writes OUTPUT]`` as the whole request is judged by OUTPUT, as if a model had written it. It takes ``MAX_IN_FLIGHT``
questions at once.

python tests/integrations/litellm/worker.py --socket /tmp/guard.sock
"""

from __future__ import annotations

import argparse
import io
import re
from dataclasses import replace
from pathlib import Path

from PIL import Image

from guard_middleware.guard.parse import parse
from guard_middleware.types import Verdict
from guard_middleware.wire import ModerationRequest
from guard_middleware.worker import serve
from guard_middleware.worker.app import MAX_FRAME, Worker
from guard_middleware.worker.metrics import Metrics
from tests.support.scripted_worker import ScriptedGuard, text_of

MAX_IN_FLIGHT = 16


class SeeingGuard(ScriptedGuard):
    async def moderate(self, request: ModerationRequest, deadline: float) -> Verdict:
        verdict = await super().moderate(request, deadline)
        if any(_red(blob.data) for blob in request.conversation.blobs()):
            return replace(verdict, request="harmful", request_score=1.0)
        written = re.fullmatch(r"\[writes (.*)\]", text_of(request.conversation.messages), re.DOTALL)
        if written and request.conversation.answer is None:
            return replace(verdict, request=parse(written[1], answered=False).request)
        return verdict


def _red(data: bytes) -> bool:
    red, green, blue = Image.open(io.BytesIO(data)).convert("RGB").resize((1, 1)).getpixel((0, 0))
    return red > 200 and green < 80 and blue < 80


async def load(metrics: Metrics) -> SeeingGuard:
    return SeeingGuard()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", type=Path, required=True)
    options = parser.parse_args()
    serve.log_to_stderr("warning")
    worker = Worker(load, on_ready=lambda guard: print("worker ready", flush=True), max_in_flight=MAX_IN_FLIGHT)
    server = serve.Server(worker.asgi, serve.unix_listener(options.socket), max_frame=MAX_FRAME)
    raise SystemExit(server.run())


if __name__ == "__main__":
    main()
