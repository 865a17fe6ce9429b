"""The test's end of ``driver.py``, and of a real worker on vLLM."""

from __future__ import annotations

import base64
import itertools
import json
import queue
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

from tests import vllm_environment

_DRIVER = Path(__file__).with_name("driver.py")
#: seconds for a start on a machine that does other things too
START = 900.0
_ANSWER = 120.0
ENGINE_ARGS = {"enforce_eager": True, "gpu_memory_utilization": 0.1, "skip_mm_profiling": True}


class Driver:
    """One engine in another process; started at once, ready when ``ready`` returns."""

    def __init__(self, folder: Path, max_batch: int, **environment: str) -> None:
        argv = [str(vllm_environment.python()), str(_DRIVER), str(folder), str(max_batch)]
        self._log = folder / "driver.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                argv,
                env=dict(vllm_environment.variables(**environment)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._ids = itertools.count(1)
        self._lines: queue.Queue[str] = queue.Queue()
        self._answers: dict[int, dict] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.processes: list[int] = self._next(START)["processes"]

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _next(self, seconds: float) -> dict:
        line = self._lines.get(timeout=seconds)
        if not line:
            raise RuntimeError(f"the driver has ended: {self._log.read_text()[-3000:]}")
        return json.loads(line)

    def send(self, **asked) -> int:
        n = next(self._ids)
        self._process.stdin.write(json.dumps({"n": n, **asked}) + "\n")
        self._process.stdin.flush()
        return n

    def begin(self, prompt, priority: int = 0) -> int:
        """Sends a ``GuardPrompt``; ``answer`` has what comes of it."""
        images = [base64.b64encode(image).decode() for image in prompt.images]
        fields = {"answered": prompt.answered, "max_new_tokens": prompt.max_new_tokens, "think": prompt.think}
        return self.send(prompt={"ids": list(prompt.ids), "images": images, **fields}, priority=priority)

    def answer(self, n: int) -> Mapping:
        while n not in self._answers:
            found = self._next(_ANSWER)
            self._answers[found["n"]] = found
        return self._answers.pop(n)

    def order(self, *wanted: int) -> list[int]:
        """The numbers in the order in which they were answered."""
        order = []
        while len(order) < len(wanted):
            found = self._next(_ANSWER)
            if found["n"] in wanted:
                order.append(found["n"])
        return order

    def generate(self, prompt) -> Mapping:
        return self.answer(self.begin(prompt))

    def gauges(self) -> Mapping:
        return self.answer(self.send(gauges=True))

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(10)
        self._process.stdout.close()


def start_worker(socket: Path, folder: Path, *options: str) -> subprocess.Popen:
    """A worker with nano on vLLM, as its users start it; its standard error lies in ``folder``."""
    args = folder / "args.json"
    args.write_text(json.dumps(ENGINE_ARGS))
    argv = [str(vllm_environment.python()), "-m", "guard_middleware.worker", "--engine", "vllm", "--model", "nano"]
    with (folder / "worker.log").open("wb") as log:
        return subprocess.Popen(
            [*argv, "--socket", str(socket), "--no-reader", "--vllm-args", str(args), *options],
            env=dict(vllm_environment.variables()),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
