"""Runs a real ``VllmEngine`` for tests: JSON lines in and out, in vLLM's own environment.

python driver.py FOLDER MAX_BATCH      first line out: {"ready": true, "image_tokens": ..., "processes": [...]}
{"n": 1, "prompt": {...}, "priority": 0}   ->  {"n": 1, "generation": {...}} or {"n": 1, "error": kind}
{"n": 2, "cancel": 1}                      ->  {"n": 2, "cancelled": true}, and nothing for 1
{"n": 3, "gauges": true}                   ->  {"n": 3, "gauges": {...}, "dead": false}
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import multiprocessing
import sys
from pathlib import Path


def say(**answer) -> None:
    print(json.dumps(answer), flush=True)


async def serve(engine) -> None:
    from guard_middleware.errors import GuardError
    from guard_middleware.worker.engine import GuardPrompt

    tasks: dict[int, asyncio.Task] = {}

    async def generate(n, asked, priority) -> None:
        images = tuple(base64.b64decode(image) for image in asked.pop("images"))
        prompt = GuardPrompt(ids=tuple(asked.pop("ids")), images=images, **asked)
        try:
            generation = await engine.generate(f"test-{n}", prompt, priority)
        except GuardError as error:
            say(n=n, error=error.kind.value)
        else:
            say(n=n, generation=dataclasses.asdict(generation))

    while line := await asyncio.to_thread(sys.stdin.readline):
        match json.loads(line):
            case {"n": n, "prompt": asked, "priority": priority}:
                tasks[n] = asyncio.create_task(generate(n, asked, priority))
            case {"n": n, "cancel": other}:
                tasks[other].cancel()
                await asyncio.gather(tasks[other], return_exceptions=True)
                say(n=n, cancelled=tasks[other].cancelled())
            case {"n": n, "gauges": True}:
                say(n=n, gauges=dict(engine.gauges()), dead=engine.dead)
    await engine.close()


def main() -> None:
    from guard_middleware.worker.engine_vllm import VllmEngine
    from guard_middleware.worker.weights import load

    class Scripted(VllmEngine):
        def _processors(self):
            return [*super()._processors(), "tests.worker.vllm_rig.script:Script"]

    folder = Path(sys.argv[1])
    args = {"enforce_eager": True, "gpu_memory_utilization": 0.1, "skip_mm_profiling": True}
    engine = Scripted(load(folder, name="tiny"), max_batch=int(sys.argv[2]), args=args)
    say(ready=True, processes=[process.pid for process in multiprocessing.active_children()])
    asyncio.run(serve(engine))


if __name__ == "__main__":  # vLLM's processes import this file again
    main()
