"""Asks nano the same rows on transformers and on vLLM, and counts where the verdicts differ.

    python tests/worker/compare_engines.py --data dev.jsonl.gz [--rows 500] [--seed 7] [--json FILE]

Rows are drawn by the seed from a JSONL file as ``guard-gateway check`` reads it (gzipped or not). Prints counts, and
the ids of rows whose labels differ; never a row.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import random
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from guard_middleware import cases, check
from guard_middleware.errors import GuardError
from guard_middleware.guard.client import GuardClient
from guard_middleware.types import Verdict
from guard_middleware.wire import ModerationRequest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.worker.vllm_rig.process import start_worker  # noqa: E402

_AT_ONCE = 8
_SECONDS = 600.0


class Unread:
    """A guard to which text drawn in images is not read: there is no reader beside vLLM here."""

    def __init__(self, client: GuardClient) -> None:
        self._client = client

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        return await self._client.moderate(replace(request, reader=False))


async def judged(client: GuardClient, rows: list[dict[str, Any]], base: Path) -> list[Verdict | GuardError]:
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(row: dict[str, Any]) -> Verdict | GuardError:
        async with places:
            return await cases.judge(Unread(client), row, base=base, deadline=_SECONDS)

    return list(await asyncio.gather(*map(one, rows)))


async def on_transformers(rows: list[dict[str, Any]], base: Path) -> list[Verdict | GuardError]:
    async with check.worker("nano", threads=1) as client:
        return await judged(client, rows, base)


async def on_vllm(rows: list[dict[str, Any]], base: Path) -> list[Verdict | GuardError]:
    with tempfile.TemporaryDirectory(prefix="guard-") as folder, ExitStack() as ends:
        socket = Path(folder) / "w.sock"
        process = ends.enter_context(start_worker(socket, Path(folder)))
        ends.callback(process.terminate)
        line = await asyncio.to_thread(process.stdout.readline)
        if not line.startswith("worker ready"):
            raise SystemExit((Path(folder) / "worker.log").read_text()[-2000:])
        client = GuardClient(str(socket))
        try:
            return await judged(client, rows, base)
        finally:
            await client.aclose()


def report(rows: list[dict[str, Any]], here: list[Any], there: list[Any]) -> dict[str, Any]:
    counts = dict.fromkeys(
        ("rows", "same verdict", "same error", "other label", "verdict against error", "other reasoning"), 0
    )
    differing, apart = [], []
    for row, a, b in zip(rows, here, there, strict=True):
        counts["rows"] += 1
        if isinstance(a, GuardError) or isinstance(b, GuardError):
            same = isinstance(a, GuardError) and isinstance(b, GuardError) and a.kind == b.kind
            counts["same error" if same else "verdict against error"] += 1
            continue
        same = (a.request, a.response) == (b.request, b.response)
        counts["same verdict" if same else "other label"] += 1
        counts["other reasoning"] += a.reasoning != b.reasoning
        apart.append(abs(a.request_score - b.request_score))
        if not same:
            differing.append(row["id"])
    return {"counts": counts, "differing": differing, "largest difference of scores": max(apart, default=0.0)}


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--data", type=Path, required=True)
    cli.add_argument("--rows", type=int, default=500)
    cli.add_argument("--seed", type=int, default=7)
    cli.add_argument("--json", type=Path, metavar="FILE")
    options = cli.parse_args()
    opened = gzip.open if options.data.suffix == ".gz" else open
    with opened(options.data, "rb") as lines:
        rows = list(cases.rows(lines, str(options.data)))
    rows = random.Random(options.seed).sample(rows, min(options.rows, len(rows)))
    base = options.data.parent
    here = asyncio.run(on_transformers(rows, base))
    there = asyncio.run(on_vllm(rows, base))
    found = report(rows, here, there)
    print(json.dumps(found, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
