"""What one verdict costs with the bundled guard on this machine: seconds by stage, tokens, seconds per token.

    python tests/bench/verdict.py [--model nano] [--rounds 30] [--threads 2] [--json FILE]

One question at a time through the real worker, as the gateway asks; texts of 10, 60 and 200 words, a picture without
words and one with a drawn list (each picture is new, so that the reader's cache does not help). Targets on two CPU
cores: a text verdict below 1.5 s and an image verdict below 2.0 s, median.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from guard_middleware import check
from guard_middleware.types import Blob, Conversation, Message, Part, Text, Verdict
from guard_middleware.wire import ModerationRequest

WORDS = (
    "please explain to a curious reader how a small bakery plans its week, which flour it orders, how the dough rests "
    "and why the oven is heated early in the morning before the first customers come"
).split()


def words(count: int, rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def picture(text: str | None, rng: random.Random) -> Blob:
    image = Image.new("RGB", (480, 360), tuple(rng.randrange(200, 256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    if text is None:
        x, y = rng.randrange(0, 300), rng.randrange(0, 200)
        draw.ellipse((x, y, x + 120, y + 120), fill=(200, 60, 40))
    else:
        draw.multiline_text((20, 20), text, fill="black", font=ImageFont.load_default(28), spacing=10)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Blob("image/png", buffer.getvalue())


def cases(rng: random.Random) -> dict[str, Callable[[], tuple[Part, ...]]]:
    def drawn() -> str:
        return "\n".join(f"{n}. {words(5, rng)}" for n in range(1, 6))

    return {
        "text, 10 words": lambda: (Text(words(10, rng)),),
        "text, 60 words": lambda: (Text(words(60, rng)),),
        "text, 200 words": lambda: (Text(words(200, rng)),),
        "picture without words": lambda: (Text(words(8, rng)), picture(None, rng)),
        "picture of a drawn list": lambda: (Text(words(8, rng)), picture(drawn(), rng)),
    }


async def measure(model: str, rounds: int, threads: int) -> tuple[float, dict[str, list[tuple[float, Verdict]]]]:
    rng = random.Random(7)
    began = time.perf_counter()
    results: dict[str, list[tuple[float, Verdict]]] = {}
    async with check.worker(model, threads=threads) as client:
        ready = time.perf_counter() - began
        for round_ in range(rounds + 2):  # two rounds of warm-up
            for name, parts in cases(rng).items():
                conversation = Conversation((Message("user", parts()),))
                asked = time.perf_counter()
                outcome = await client.moderate(ModerationRequest(f"{round_}", conversation, "input", 60.0))
                seconds = time.perf_counter() - asked
                if not isinstance(outcome, Verdict):
                    raise outcome
                if round_ >= 2:
                    results.setdefault(name, []).append((seconds, outcome))
    return ready, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    ready, results = asyncio.run(measure(options.model, options.rounds, options.threads))
    table = Table(title=f"One verdict with {options.model}, {options.threads} threads; worker ready in {ready:.1f} s")
    for column in ("case", "median", "p90", "reader", "generate", "tokens", "per token"):
        table.add_column(column, justify="left" if column == "case" else "right")
    summary: dict[str, Any] = {"model": options.model, "threads": options.threads, "ready_seconds": ready, "cases": {}}
    for name, runs in results.items():
        seconds = sorted(s for s, _ in runs)
        stages = {
            stage: statistics.median(dict(v.timings).get(stage, 0.0) for _, v in runs)
            for stage in ("reader", "generate")
        }
        tokens = statistics.median(v.usage.completion for _, v in runs)
        row = {
            "median": statistics.median(seconds),
            "p90": seconds[int(0.9 * (len(seconds) - 1))],
            **stages,
            "tokens": tokens,
            "per_token": stages["generate"] / tokens,
        }
        summary["cases"][name] = row
        times = [f"{row[key] * 1000:.0f} ms" for key in ("median", "p90", "reader", "generate")]
        table.add_row(name, *times, f"{tokens:.0f}", f"{row['per_token'] * 1000:.1f} ms")
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
