"""What the guard adds to a LiteLLM proxy: no guardrail, LiteLLM's generic_guardrail_api, and ours, interleaved.

    python tests/bench/litellm.py [--rounds 300] [--json]

Starts three real LiteLLM proxies (of the environment ``.clients/litellm``, which is made where it is missing) in front
of one scripted upstream: one without a guardrail, one whose ``generic_guardrail_api`` asks an HTTP server that always
allows, and one with ours and the scripted worker. Both judge requests and answers. One client with kept-alive
connections sends the same body of about 1.3 kB to all in turn, so that whatever else the machine does hits all alike.
``added`` is the difference of two medians to the proxy without a guardrail. The target: ours adds at most 5 ms. ``cpu``
is the processor time of the proxy's process per request, which other load does not stretch. Takes about two minutes
on 2 idle cores and exits 1 where the target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.integrations.litellm import stage  # noqa: E402
from tests.support.gateway import scripted_worker  # noqa: E402

WARM_UP, ADDED_MEDIAN_MS = 30, 5.0
ARMS = ("no guardrail", "generic_guardrail_api", "guard_integrations.litellm")
COLUMNS = ("answer", "arm", "median_ms", "p95_ms", "added_ms", "cpu_ms")
RECIPE = "Mix flour, water and salt, let the dough rest for an hour, fold it twice, then bake it on a hot stone. "


def body(stream: bool) -> dict[str, Any]:
    """A chat of three turns, about 1.3 kB."""
    return {
        "model": "chat/good",
        "messages": [
            {"role": "system", "content": "You are a patient baker who answers in a few plain sentences. " * 3},
            {"role": "user", "content": "How do I bake bread without yeast? I have flour, salt and a hot oven."},
            {"role": "assistant", "content": RECIPE * 5},
            {"role": "user", "content": "And what changes when I use rye flour, and bake two loaves at once? " * 4},
        ],
        "stream": stream,
    }


class Allowing(stage.Upstream):
    """A server of ``generic_guardrail_api`` that allows at once."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"action":"NONE"}'})


def generic(url: str) -> dict[str, Any]:
    params = {"guardrail": "generic_guardrail_api", "mode": ["pre_call", "post_call"], "default_on": True}
    return {"guardrail_name": "generic", "litellm_params": {**params, "api_base": url, "api_key": "k"}}


def measure(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds by arm; each round calls every arm once, in turning order."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds + WARM_UP):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.perf_counter()
            calls[name]()
            if number >= WARM_UP:
                taken[name].append((time.perf_counter() - started) * 1000)
    return taken


def cpu_ms(pid: int) -> float:
    """Processor time of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")


def run(rounds: int) -> list[dict[str, Any]]:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        socket = folder / "worker.sock"
        (folder / "guard.yaml").write_text(
            json.dumps({"worker": {"socket": str(socket), "manage": False}, "audit": {"path": str(folder / "log")},
                        "cache": {"verdicts": {"entries": 0}}})
        )  # fmt: skip
        stack.enter_context(scripted_worker(socket))
        upstream = stack.enter_context(stage.Upstream())
        allowing = stack.enter_context(Allowing())
        rails = (None, [generic(allowing.url)], [stage.guardrail(folder / "guard.yaml")])
        proxies = {}
        for number, (arm, rail) in enumerate(zip(ARMS, rails, strict=True)):
            proxies[arm] = stack.enter_context(stage.Proxy(folder / str(number), upstream.url, rail))
        client = stack.enter_context(httpx.Client(trust_env=False, timeout=60))

        def call(proxy: stage.Proxy, stream: bool) -> None:
            headers = {"authorization": f"Bearer {stage.KEY}"}
            response = client.post(f"{proxy.url}/v1/chat/completions", json=body(stream), headers=headers)
            assert response.status_code == 200, response.text
            assert "oven" in response.text

        rows = []
        for stream in (False, True):
            arms = {arm: (lambda proxy=proxy, stream=stream: call(proxy, stream)) for arm, proxy in proxies.items()}
            before = {arm: cpu_ms(proxy.popen.pid) for arm, proxy in proxies.items()}
            taken = measure(arms, rounds)  # type: ignore[arg-type]
            cpu = {arm: (cpu_ms(p.popen.pid) - before[arm]) / (rounds + WARM_UP) for arm, p in proxies.items()}
            base = statistics.median(taken[ARMS[0]])
            for arm, values in taken.items():
                median = statistics.median(values)
                p95 = statistics.quantiles(values, n=20)[-1]
                row = {"answer": "streamed" if stream else "whole", "arm": arm, "requests": len(values)}
                times = {"median_ms": median, "p95_ms": p95, "added_ms": median - base, "cpu_ms": cpu[arm]}
                rows.append({**row, **{name: round(value, 2) for name, value in times.items()}})
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = run(options.rounds)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print("| answer | arm | median ms | p95 ms | added median ms | cpu ms |\n|---|---|---|---|---|---|")
        for row in rows:
            print("| " + " | ".join(str(row[name]) for name in COLUMNS) + " |")
    raise SystemExit(any(row["added_ms"] > ADDED_MEDIAN_MS for row in rows if row["arm"] == ARMS[2]))


if __name__ == "__main__":
    main()
