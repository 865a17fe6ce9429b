"""Ends vLLM's processes when the worker dies, however it dies.

A killed worker would leave vLLM's engine process behind, and with it the GPU's memory, so that no other worker could
start (vllm-project/vllm#55510). vLLM imports this module into each of its model processes, as the extension of their
worker class; from there on a thread waits for the death of the process that ``GUARD_MIDDLEWARE_WORKER_PID`` names.
Nothing else may import it.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from contextlib import suppress


class Extension:
    """Adds nothing; it is there to be imported."""


def _watch(worker: int, engine: int) -> None:
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(worker)], [], [])
    if engine not in (worker, 1) and os.getppid() == engine:
        with suppress(ProcessLookupError):
            os.kill(engine, signal.SIGKILL)
    os._exit(1)


if (_worker := os.environ.get("GUARD_MIDDLEWARE_WORKER_PID")) is not None and hasattr(os, "pidfd_open"):
    # The parent is the engine's process, or the worker where vLLM runs its model in the engine's.
    threading.Thread(target=_watch, args=(int(_worker), os.getppid()), daemon=True, name="guard-end").start()
