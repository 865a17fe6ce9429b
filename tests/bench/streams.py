"""Streams while they are judged: what is held for how long, what leaks, what the race hides, what 200 at once cost.

    python -m tests.bench.streams [--only modes|race|leak|load] [--json FILE]

modes  An upstream of 50 tokens/s and a guard that takes 300 ms, in this process: an answer of 800 tokens in each mode,
       all at once, beside the upstream's own times. "Unscreened" compares the text that the client has with the text
       of the verdicts that were given until then, without the gateway's own count.
race   Time to first token with and without ``race``, in mode async (which adds nothing of its own), for several times
       of guard and upstream; added to the same upstream without a gateway, median of interleaved runs.
leak   Random splits of an answer that becomes harmful somewhere, random orders of pieces and verdicts: what was shown
       past the harmful point. No clock.
load   ``guard-gateway serve`` with the scripted worker and 200 streams with a marker each: none lost, none mixed. Then
       a few that are held at the limit of ``answer_bytes`` (8 MiB) at the same time: peak memory of the gateway per
       stream, from /proc.

Prints one table with each target beside its figure, and exits 1 where one is missed. Takes about 2 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

from guard_middleware import config
from guard_middleware.commands import Ask, Judged, Respond, Send
from guard_middleware.dialects import CHAT_COMPLETIONS
from guard_middleware.dialects.base import Options
from guard_middleware.limits import Limits
from guard_middleware.middleware import GuardMiddleware
from guard_middleware.policy import PolicySet
from guard_middleware.runtime import Runtime
from guard_middleware.transaction import Transaction
from tests.support import records
from tests.support.flow import ENDING, Client, Speaker, chat, opening, says
from tests.support.gateway import Gateway, Seen, Upstream, chunked, event, scripted_worker, stream_head
from tests.support.guards import RuleGuard
from tests.support.scripted_worker import label

MODES = ("hold", "window", "async")
BOUND = 1000
GUARD, RATE = 0.3, 50
RACES = ((0.0, 0.2), (0.1, 0.3), (0.3, 0.3), (0.3, 0.1), (0.5, 0.0))
RACE_SLACK = 0.010
CAP = 8 * 1024 * 1024
HARM = "now pick a lock"


@dataclass(frozen=True)
class Row:
    """One line of the table; ``bound`` None is for comparison only."""

    part: str
    what: str
    figure: float
    unit: str = ""
    bound: float | None = None

    @property
    def missed(self) -> bool:
        return self.bound is not None and self.figure > self.bound + 1e-9


def policy(mode: str, **more: Any) -> config.Config:
    stream = {"mode": mode} | ({"leak_bound": BOUND} if mode == "async" else {})
    value = {"policies": {"p": {"output": {"stream": stream}, **more}}, "default_policy": "p"}
    return config.parse(json.dumps({**value, "cache": {"verdicts": {"entries": 0}}}))  # each run asks anew


def words(tokens: int) -> list[str]:
    return [f"t{number:03} " for number in range(tokens)]


# -- modes --


class Watched(RuleGuard):
    """Keeps when which text of the answer had its verdict."""

    def __init__(self, seconds: float) -> None:
        super().__init__({"output": seconds})
        self.given: list[tuple[float, str]] = []

    async def moderate(self, request: Any) -> Any:
        outcome = await super().moderate(request)
        if request.source == "output":
            self.given.append((time.perf_counter(), said(request.conversation.answer)))
        return outcome

    @property
    def characters(self) -> int:
        return sum(len(said(request.conversation.answer)) for request in self.of("output"))


def said(answer: Any) -> str:
    return "".join(part.text for part in answer.parts)


async def answer(mode: str, tokens: int, rate: float, seconds: float) -> tuple[Client, Speaker, Watched, str]:
    """One answer through the middleware in one mode; its own text, so that no verdict is known already."""
    texts = [f"{mode[0]}{number:03} " for number in range(tokens)]
    speaker, guard = Speaker(texts, first=1 / rate, pause=1 / rate), Watched(seconds)
    runtime = Runtime(policy(mode), guard=guard)
    client = await Client(chat()).run(GuardMiddleware(speaker, runtime=runtime))
    await runtime.aclose()
    assert client.text() == "".join(texts), f"{mode}: the text did not arrive as it was sent"
    return client, speaker, guard, "".join(texts)


def unscreened(client: Client, guard: Watched, text: str) -> int:
    """The most characters that the client had beyond the end of every verdict given by then."""
    worst = shown = 0
    for at, data in client.pieces:
        shown += len(client.text(data=data))
        ends = [text.index(asked) + len(asked) for given, asked in guard.given if given <= at]
        worst = max(worst, shown - max(ends, default=0))
    return worst


async def modes(tokens: int, rate: float = RATE, seconds: float = GUARD) -> list[Row]:
    rows = []
    runs = await asyncio.gather(*(answer(mode, tokens, rate, seconds) for mode in MODES))
    for mode, (client, speaker, guard, text) in zip(MODES, runs, strict=True):
        own = speaker.ended - speaker.began
        first_window = next(at for n, at in enumerate(speaker.times) if len(text) * n / tokens >= 240) - speaker.began
        window = mode == "window"
        first = client.first_text() - speaker.began
        rows += [
            Row(mode, "time to first text", first, "s", 1.3 * (seconds + first_window) if window else None),
            Row(
                mode,
                "total, of the upstream's own",
                (client.ended - speaker.began) / own,
                "x",
                1.15 if window else None,
            ),
            Row(
                mode, "text the guard read, of the answer's", guard.characters / len(text), "x", 2.5 if window else None
            ),
            Row(
                mode,
                "shown before a verdict",
                unscreened(client, guard, text),
                "chars",
                BOUND if mode == "async" else 0,
            ),
        ]
    return rows


# -- race --


async def first_token(app: Any) -> float:
    client = await Client(chat()).run(app)
    return client.first_text() - client.began


async def race(repeats: int) -> list[Row]:
    rows = []
    for guard_seconds, upstream_seconds in RACES:
        runtimes = [
            Runtime(policy("async", race=on), guard=RuleGuard({"input": guard_seconds})) for on in (True, False)
        ]
        times: dict[str, list[float]] = {"alone": [], "race": [], "no race": []}
        for number in range(repeats + 1):
            speaker = Speaker(words(3), first=upstream_seconds)
            apps = [speaker, *(GuardMiddleware(speaker, runtime=runtime) for runtime in runtimes)]
            # one after the other: at the same time they would wait for each other's work; the first run warms up
            for name, app in zip(times, apps, strict=True):
                seconds = await first_token(app)
                if number:
                    times[name].append(seconds)
        for runtime in runtimes:
            await runtime.aclose()
        alone, raced, plain = (statistics.median(found) for found in times.values())
        what = f"added to first token; guard {guard_seconds * 1e3:.0f} ms, upstream {upstream_seconds * 1e3:.0f} ms"
        bound = max(0.0, guard_seconds - upstream_seconds) + RACE_SLACK
        rows += [
            Row("race", what, (raced - alone) * 1e3, "ms", bound * 1e3),
            Row("no race", what, (plain - alone) * 1e3, "ms"),
        ]
    return rows


# -- leak --


def leaked(mode: str, random_: random.Random) -> int:
    """Characters shown past the point where the answer became harmful, in one random run of the state machine."""
    before, after = random_.randint(0, 1500), random_.randint(0, 3000)
    text = "." * before + HARM + "." * after
    pieces: list[bytes] = [opening()]
    at = 0
    longest = random_.choice((1, 4, 40, 400))
    while at < len(text):
        size = random_.randint(1, longest)
        pieces += says(text[at : at + size])
        at += size
    pieces += [ENDING]
    return max(0, len(shown(policy(mode), pieces, random_)) - before - len(HARM))


def shown(settings: config.Config, pieces: list[bytes], random_: random.Random) -> str:
    """Feeds pieces and verdicts in a random order, as far as the upstream may go on; what a client read."""
    tx = Transaction("gd_1", "POST", "/v1/chat/completions", limits=Limits(), created=0)
    tx.routed(CHAT_COMPLETIONS, Options(), PolicySet(settings).resolve(path="/v1/chat/completions"))
    pace = random_.random()
    out = bytearray()
    open_: list[Ask] = []

    def do(commands: list[Any]) -> None:
        for command in commands:
            match command:
                case Ask():
                    open_.append(command)
                case Send(data):
                    out.extend(data)
                case Respond(reply):
                    out.extend(reply.body)

    def judge() -> None:
        ask = open_.pop(random_.randrange(len(open_)))
        do(tx.judged(Judged(ask.call, verdict(ask.call.conversation), 0.0)))

    do(tx.request(CHAT_COMPLETIONS.parse_request(chat(), Limits(), Options())))
    judge()
    tx.upstream_head(200, ((b"content-type", b"text/event-stream"),))
    for piece in pieces:
        while open_ and (tx.paused or random_.random() < pace):
            judge()
        do(tx.upstream_data(piece))
    do(tx.upstream_end())
    while open_:
        judge()
    client = Client({})
    return client.text(data=bytes(out))


def verdict(conversation: Any) -> Any:
    response = None if conversation.answer is None else label(said(conversation.answer))
    return records.verdict(
        "input", response=response, response_score=None if response is None else float(response == "harmful")
    )


def leak(splits: int) -> list[Row]:
    random_ = random.Random(4)
    what = f"most shown past the harmful point, {splits} random splits"
    bounds = {"hold": 0, "window": 0, "async": BOUND}
    return [Row(m, what, max(leaked(m, random_) for _ in range(splits)), "chars", bounds[m]) for m in MODES]


# -- load --


def marked(tokens: int, pause: float) -> Callable[[Seen, asyncio.StreamReader, asyncio.StreamWriter], Any]:
    async def behaviour(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stream_head() + chunked(opening(), end=False))
        for number in range(tokens):
            await asyncio.sleep(pause)
            writer.write(chunked(*says(f"{seen.model}-{number} "), end=False))
        writer.write(chunked(ENDING))
        await writer.drain()

    return behaviour


class AtTheCap:
    """An upstream that says as much as the limit allows, and ends only when all streams have come that far."""

    def __init__(self, size: int) -> None:
        self.size, self.there, self.go = size, 0, False
        head = {
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "gpt-4o-2024-08-06",
            "service_tier": "default",
        }
        head |= {"id": "chatcmpl-BxYzAbCdEfGhIjKlMnOpQrStUvWx", "system_fingerprint": "fp_abcdef1234"}
        self._head = head

    def _chunk(self, number: int) -> bytes:
        choice = {"index": 0, "delta": {"content": f"{number % 1000:03} "}, "logprobs": None, "finish_reason": None}
        return event({**self._head, "choices": [choice]})

    async def __call__(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stream_head())
        sent = number = 0
        while sent < self.size - 64 * 1024:
            data = b"".join(self._chunk(number + n) for n in range(100))
            number, sent = number + 100, sent + len(data)
            writer.write(chunked(data, end=False))
            await writer.drain()
        self.there += 1
        while not self.go:
            await asyncio.sleep(0.05)
        writer.write(chunked(ENDING))
        await writer.drain()


def memory(pid: int, field: str) -> float:
    """MB of ``field`` (VmRSS, VmHWM) of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))


async def streams(url: str, models: list[str]) -> dict[str, bytes]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trust_env=False) as session:

        async def one(model: str) -> bytes:
            async with session.post(f"{url}/v1/chat/completions", json=chat() | {"model": model}) as response:
                return await response.read()

        return dict(zip(models, await asyncio.gather(*map(one, models)), strict=True))


def load(count: int, tokens: int, capped: int, cap: int = CAP, seconds: float = 5.0) -> list[Row]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="guard-bench-")))
        cap_upstream = AtTheCap(cap)
        behaviours = {"m": marked(tokens, seconds / tokens), "cap": cap_upstream}
        upstream = stack.enter_context(Upstream(behaviours))
        stack.enter_context(scripted_worker(folder / "w.sock"))

        def gateway(mode: str) -> Gateway:
            rules = {"mode": mode}
            section = {"deadline": "120s"}
            policies = {"policies": {"p": {"input": section, "output": {**section, "stream": rules}}}}
            more = {"default_policy": "p", "limits": {"answer_bytes": cap}}
            return stack.enter_context(Gateway(folder, upstream.url, folder / "w.sock", {**policies, **more}))

        rows = list(_many(gateway("window"), count, tokens))
        if capped:
            rows.append(_capped(gateway("hold"), cap_upstream, capped))
        return rows


def _many(gateway: Gateway, count: int, tokens: int) -> Iterator[Row]:
    asyncio.run(streams(gateway.url, [f"m.w{n}" for n in range(10)]))
    before = memory(gateway.popen.pid, "VmRSS")
    began = time.perf_counter()
    answers = asyncio.run(streams(gateway.url, [f"m.{n}" for n in range(count)]))
    took = time.perf_counter() - began
    client = Client({})
    texts = {model: client.text(data=data) for model, data in answers.items()}
    lost = sum(not data.endswith(b"data: [DONE]\n\n") for data in answers.values())
    wrong = sum(text != "".join(f"{m}-{n} " for n in range(tokens)) for m, text in texts.items())
    name = f"{count} at once"
    yield Row(name, "lost", lost, "streams", 0)
    yield Row(name, "mixed, or not as they were sent", wrong, "streams", 0)
    yield Row(name, "all of them took", took, "s")
    yield Row(name, "peak memory per stream", (memory(gateway.popen.pid, "VmHWM") - before) / count, "MB", 10)


def _capped(gateway: Gateway, upstream: AtTheCap, count: int) -> Row:
    asyncio.run(streams(gateway.url, ["m.warm"]))
    before = memory(gateway.popen.pid, "VmRSS")

    async def run() -> dict[str, bytes]:
        asked = asyncio.create_task(streams(gateway.url, [f"cap.{n}" for n in range(count)]))
        while upstream.there < count and not asked.done():
            await asyncio.sleep(0.05)
        upstream.go = True
        return await asked

    answers = asyncio.run(run())
    assert all(data.endswith(b"data: [DONE]\n\n") and len(data) > upstream.size / 2 for data in answers.values())
    peak = (memory(gateway.popen.pid, "VmHWM") - before) / count
    return Row(f"{count} at the cap", f"peak memory per stream of {upstream.size / 2**20:.1f} MiB held", peak, "MB", 10)


def show(rows: list[Row]) -> None:
    table = Table(title="Streams while they are judged", caption="repeat: python -m tests.bench.streams")
    for name in ("", "what", "figure", "target"):
        table.add_column(name, justify="right" if name in ("figure", "target") else "left")
    for row in rows:
        target = "" if row.bound is None else f"<= {row.bound:.4g} {row.unit}"
        colour = "" if row.bound is None else "[red]" if row.missed else "[green]"
        table.add_row(row.part, row.what, f"{colour}{row.figure:.4g} {row.unit}", target)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("modes", "race", "leak", "load"))
    parser.add_argument("--tokens", type=int, default=800, help="of the answer in each mode (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each race (default %(default)s)")
    parser.add_argument("--splits", type=int, default=500, help="random splits per mode (default %(default)s)")
    parser.add_argument("--streams", type=int, default=200, help="concurrent streams (default %(default)s)")
    parser.add_argument("--capped", type=int, default=4, help="streams held at the limit (default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    parts: dict[str, Callable[[], list[Row]]] = {
        "modes": lambda: asyncio.run(modes(options.tokens)),
        "race": lambda: asyncio.run(race(options.repeats)),
        "leak": lambda: leak(options.splits),
        "load": lambda: load(options.streams, 50, options.capped),
    }
    rows = [row for name, part in parts.items() if options.only in (None, name) for row in part()]
    show(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return int(any(row.missed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
