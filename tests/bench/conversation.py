"""What each turn of a conversation costs the guard: judged whole each time, and without what was judged before.

    python tests/bench/conversation.py [--model nano] [--rounds 5] [--question 10] [--answer 250] [--json FILE]

A 20-turn conversation with an image in every second turn, through the real worker: each turn is one question about the
request and one about its answer. Both ways run side by side on the same words, each round on others. Target: the work
of turn 20 is at most 1.2 times that of turn 2, in seconds and in prompt tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import math
import os
import random
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from guard_middleware import check, media
from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.imagecache import CanonicalImages
from guard_middleware.limits import Limits
from guard_middleware.stores import MemoryStore
from guard_middleware.types import (
    Action,
    Basis,
    Blob,
    Conversation,
    Decision,
    GuardCall,
    Message,
    Part,
    Record,
    Source,
    Text,
    Verdict,
)
from guard_middleware.verdicts import CachedGuard
from guard_middleware.wire import Guard, ModerationRequest

TURNS, SHOWN = 20, (1, 2, 3, 5, 10, 15, 20)
TARGET = 1.2
WORDS = (
    "please explain to a curious reader how a small bakery plans its week which flour it orders how the dough rests "
    "and why the oven is heated early in the morning before the first customers come for bread and cake with butter"
).split()


def words(count: int, rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def photo(rng: random.Random) -> Blob:
    image = Image.effect_noise((1024, 768), 40).convert("RGB")
    ImageDraw.Draw(image).text(
        (80, 300), words(4, rng), "black", ImageFont.load_default(64), stroke_width=6, stroke_fill="white"
    )
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return Blob("image/jpeg", buffer.getvalue())


@dataclass(frozen=True, slots=True)
class Cost:
    """One turn: both questions together. No number is what the guard refuses to read, as too long."""

    seconds: float
    prompt: float
    completion: float
    images: int
    decoding: float


class Counting:
    """The worker, and what it was shown."""

    def __init__(self, inner: Guard) -> None:
        self._inner = inner
        self.images = 0

    async def moderate(self, request: ModerationRequest) -> Any:
        self.images += len(request.conversation.blobs())
        return await self._inner.moderate(request)


async def turn(guard: Guard, counting: Counting, talk: Conversation, answer: Message, decoding: float) -> Cost:
    calls: list[GuardCall] = []
    counting.images = 0
    began = time.perf_counter()
    questions: list[tuple[Source, Conversation]] = [("input", talk), ("output", replace(talk, answer=answer))]
    for source, asked in questions:
        outcome = await guard.moderate(ModerationRequest("bench", asked, source, 120.0))
        if isinstance(outcome, GuardError) and outcome.kind is GuardErrorKind.TOO_LONG:
            return Cost(math.nan, math.nan, math.nan, counting.images, decoding)
        if not isinstance(outcome, Verdict):
            raise outcome
        allow, basis = Action.ALLOW, Basis.VERDICT
        decision = Decision("bench", source, allow, basis, "bench", "", allow, outcome)
        calls.append(GuardCall(source, None if source == "input" else 0, decision, 0.0))
    seconds = time.perf_counter() - began
    if isinstance(guard, CachedGuard):
        guard.settled(_record(talk, answer, calls))
        await asyncio.sleep(0)
    usages = [call.decision.verdict.usage for call in calls if call.decision.verdict]
    return Cost(seconds, sum(u.prompt for u in usages), sum(u.completion for u in usages), counting.images, decoding)


def _record(talk: Conversation, answer: Message, calls: list[GuardCall]) -> Record:
    return Record(
        "bench", "chat_completions", "POST", "/v1/chat/completions", "bench", False, None, None, None, "allowed", 200,
        None, True, tuple(calls), conversation=talk, answers=(answer,),
    )  # fmt: skip


async def conversation(worker: Guard, rng: random.Random, question: int, reply: int) -> dict[str, list[Cost]]:
    counting = Counting(worker)
    ways: dict[str, Guard] = {
        "whole": counting,
        "by turn": CachedGuard(counting, MemoryStore(entries=10_000, size=2**26, ttl=3600.0), clean_below=1.0),
    }
    kept, limits = CanonicalImages(2**26), Limits()
    costs: dict[str, list[Cost]] = {way: [] for way in ways}
    talk = Conversation(())
    for number in range(1, TURNS + 1):
        parts: list[Part] = [Text(words(question, rng))]
        if number % 2 == 0:
            parts.append(photo(rng))
        talk = replace(talk, messages=(*talk.messages, Message("user", tuple(parts))))
        answer = Message("assistant", (Text(words(reply, rng)),))
        sent = [blob.data for blob in talk.blobs()]
        decoding = {
            "whole": timed(lambda: [media.canonicalise(data, limits) for data in sent]),  # noqa: B023
            "by turn": timed(lambda: [kept.get(data, lambda: media.canonicalise(data, limits)) for data in sent]),  # noqa: B023
        }
        for way, guard in ways.items():
            costs[way].append(await turn(guard, counting, talk, answer, decoding[way]))
        talk = replace(talk, messages=(*talk.messages, answer))
    return costs


def timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


async def measure(options: argparse.Namespace) -> dict[str, list[Cost]]:
    rounds: list[dict[str, list[Cost]]] = []
    async with check.worker(options.model, threads=options.threads) as client:
        for number in range(options.rounds):
            rounds.append(await conversation(client, random.Random(number), options.question, options.answer))
    return {
        way: [
            Cost(*(statistics.median(getattr(r[way][n], field) for r in rounds) for field in Cost.__slots__))
            for n in range(TURNS)
        ]
        for way in rounds[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--question", type=int, default=10, help="words of a question")
    parser.add_argument("--answer", type=int, default=250, help="words of an answer")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    costs = asyncio.run(measure(options))
    sizes = f"questions of {options.question} words, answers of {options.answer}"
    title = f"{options.model}: {sizes}; medians of {options.rounds}"
    table = Table(title=title)
    for column in (
        "way",
        "turn",
        "guard seconds",
        "prompt tokens",
        "output tokens",
        "images shown",
        "gateway decoding",
    ):
        table.add_column(column, justify="left" if column == "way" else "right")
    summary: dict[str, Any] = {"question": options.question, "answer": options.answer, "ratios": {}}
    for way, turns in costs.items():
        for number in SHOWN:
            cost = turns[number - 1]
            row = (f"{cost.seconds:.2f}", f"{cost.prompt:.0f}", f"{cost.completion:.0f}", f"{cost.images:.0f}")
            row = ("too long", "", "", "") if math.isnan(cost.seconds) else row
            table.add_row(way, str(number), *row, f"{1000 * cost.decoding:.1f} ms")
        ratios = {f: getattr(turns[19], f) / getattr(turns[1], f) for f in ("seconds", "prompt", "completion")}
        summary["ratios"][way] = ratios
        table.add_row(
            way, "20 / 2", *("" if math.isnan(r) else f"{r:.2f}" for r in ratios.values()), "", "", end_section=True
        )
    Console(width=120).print(table)
    met = all(summary["ratios"]["by turn"][field] <= TARGET for field in ("seconds", "prompt"))
    print(f"target, by turn: 20 / 2 at most {TARGET}: {'met' if met else 'MISSED'}")
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
