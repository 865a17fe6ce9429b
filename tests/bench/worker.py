"""How fast the worker judges, beside the bare engine that writes the same tokens, and beside what the machine could do.

    python tests/bench/worker.py run --engine transformers --model nano --json transformers.json
    python tests/bench/worker.py run --engine vllm --model nano --json vllm.json       (where vLLM is installed)
    python tests/bench/worker.py run --engine vllm --model 3b --reasoning-tokens 200 --batches 1,8,64 --json h100.json
    python tests/bench/worker.py plot vllm.json --out vllm.png

For each mode and batch it keeps BATCH questions in flight (made-up words, each another text) and measures verdicts per
second, tokens per verdict, p50 and p99. Then the bare engine generates as many tokens after as many prompt tokens, as
many at once, in the same process; turn about, ``--rounds`` times, the medians count. ``3b`` is the architecture of the
3B guard with random weights that are never stored: speed does not depend on the values, and the reasoning's length is
fixed by ``--reasoning-tokens``.

The roofline: a decoding step reads all weights and every row's keys and values once (bytes over the measured
bandwidth), a prompt's token costs two operations per weight (over the measured rate of large matrix products).
``share`` is the measured verdicts per second over those that both would allow; ``decode_share`` is the bare engine's
decoding alone. Both mean little where something else uses the machine; the report holds its load.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.prompt import render
from guard_middleware.types import Conversation, Judging, Message, Text, Verdict
from guard_middleware.wire import ModerationRequest
from guard_middleware.worker.batching import BatchLimits
from guard_middleware.worker.engine import GuardPrompt
from guard_middleware.worker.metrics import Metrics
from guard_middleware.worker.service import GuardService, ServiceLimits
from guard_middleware.worker.weights import NANO, Weights, load, resolve
from guard_middleware.worker.windows import plan

WORDS = (
    "please explain to a curious reader how a small bakery plans its week which flour it orders how the dough rests "
    "and why the oven is heated early in the morning before the first customers come"
).split()
MODES = {"reason": Judging(), "label": Judging(mode="label"), "hybrid": Judging(mode="hybrid", low=0.3, high=0.7)}
_SECONDS = 600.0


class Bare(Protocol):
    """An engine without the worker around it."""

    async def generate(self, prompts: list[GuardPrompt], tokens: int, at_once: int) -> None:
        """Writes ``tokens`` tokens after each prompt, neither more nor fewer, ``at_once`` at a time."""
        ...


# -- engines


def vllm_engine(weights: Weights, at_once: int, reasoning: int | None, args: dict[str, Any]) -> tuple[Any, Bare]:
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    from guard_middleware.worker.engine_vllm import VllmEngine

    class Fixed(VllmEngine):
        """Reasons for a fixed number of tokens, whatever they say, and then judges."""

        async def _reason(self, budget: int, ask: Any, writing: Any) -> bool:
            if reasoning is None:
                return await super()._reason(budget, ask, writing)
            options = {"temperature": 0.0, "ignore_eos": True, "min_tokens": reasoning, "max_tokens": reasoning}
            params = SamplingParams(**options, output_kind=RequestOutputKind.FINAL_ONLY, allowed_token_ids=plain)
            await ask(writing, params)
            writing.ids += self._encode("\n</think>\n<result>\nAnswers:\nRequest:")
            writing.thought = reasoning
            return True

    engine = Fixed(weights, max_batch=at_once, args=args)
    plain = list(range(1000, 9000))  # text, so that no control token comes out of random weights

    class BareVllm:
        async def generate(self, prompts: list[GuardPrompt], tokens: int, at_once: int) -> None:
            options = {"temperature": 0.0, "ignore_eos": True, "min_tokens": tokens, "max_tokens": tokens}
            params = SamplingParams(**options, output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False)

            async def one(prompt: GuardPrompt) -> None:
                (rendered,) = await engine._llm.renderer.render_cmpl_async(
                    [TokensPrompt(prompt_token_ids=list(prompt.ids))]
                )
                async for _ in engine._llm.generate(rendered, params, f"bare-{id(prompt)}-{time.monotonic_ns()}"):
                    pass

            await in_flight(prompts, one, at_once)

    return engine, BareVllm()


def transformers_engine(weights: Weights, at_once: int, reasoning: int | None) -> tuple[Any, Bare]:
    import torch

    from guard_middleware.worker.engine_transformers import TransformersEngine

    if reasoning is not None:
        raise SystemExit("--reasoning-tokens is for --engine vllm")
    engine = TransformersEngine(weights, max_batch=at_once)

    class BareTransformers:
        async def generate(self, prompts: list[GuardPrompt], tokens: int, at_once: int) -> None:
            for start in range(0, len(prompts), at_once):
                await asyncio.to_thread(self._batch, prompts[start : start + at_once], tokens)

        @torch.inference_mode()
        def _batch(self, prompts: list[GuardPrompt], tokens: int) -> None:
            longest = max(len(prompt.ids) for prompt in prompts)
            pads = [longest - len(prompt.ids) for prompt in prompts]
            fill = engine.encoder.im_end
            ids = torch.tensor([[fill] * pad + list(p.ids) for pad, p in zip(pads, prompts, strict=True)])
            mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
            engine._model.generate(
                input_ids=ids.to(engine._device),
                attention_mask=mask.to(engine._device),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
            )

    return engine, BareTransformers()


def random_3b(folder: Path) -> Weights:
    """A folder that says 3B and holds no weights, for vLLM's ``load_format=dummy``."""
    config = json.loads((NANO / "config.json").read_text())
    text = config["text_config"] | {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "layer_types": ["full_attention"] * 36,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = config["vision_config"] | {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    config |= {"text_config": text, "vision_config": vision, "dtype": "bfloat16"}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        (folder / name).write_bytes((NANO / name).read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_bytes((NANO / "generation_config.json").read_bytes())
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return load(folder, name="random-3b")


# -- measuring


async def in_flight(items: list[Any], one: Callable[[Any], Awaitable[None]], at_once: int) -> None:
    """Runs ``one`` on all, ``at_once`` at a time; a place is filled as soon as it is free."""
    left = iter(items)

    async def place() -> None:
        for item in left:
            await one(item)

    await asyncio.gather(*(place() for _ in range(at_once)))


class Questions:
    """Each another text, so that nothing but the system turn is known."""

    def __init__(self, words: int) -> None:
        self._rng, self._words = random.Random(7), words

    def make(self, count: int) -> list[Conversation]:
        texts = [" ".join(self._rng.choices(WORDS, k=self._words)) for _ in range(count)]
        return [Conversation((Message("user", (Text(text),)),)) for text in texts]


async def worker_round(service: GuardService, questions: list[Conversation], judging: Judging, batch: int) -> Any:
    """(seconds, seconds of each, verdicts)"""
    each: list[float] = []
    verdicts: list[Verdict] = []
    loop = asyncio.get_running_loop()

    async def one(question: Conversation) -> None:
        began = loop.time()
        request = ModerationRequest("bench", question, "input", _SECONDS, judging=judging)
        verdicts.append(await service.moderate(request, began + _SECONDS))
        each.append(loop.time() - began)

    began = time.perf_counter()
    await in_flight(questions, one, batch)
    return time.perf_counter() - began, each, verdicts


async def measure(
    options: argparse.Namespace, engine: Any, bare: Bare, machine: dict[str, Any]
) -> list[dict[str, Any]]:
    limits = ServiceLimits(BatchLimits(max(options.batches), 10_000, 10_000_000))
    service = GuardService(engine, Metrics(), limits=limits)
    questions, rows = Questions(options.words), []
    try:
        for mode in options.modes:
            for batch in options.batches:
                row = await cell(options, service, engine, bare, questions, mode, batch)
                if row is not None:
                    rows.append(row | shares(row, engine, machine))
                    print(line(rows[-1]), flush=True)
    finally:
        await service.aclose()
    return rows


async def cell(
    options: Any, service: GuardService, engine: Any, bare: Bare, questions: Questions, mode: str, batch: int
) -> dict[str, Any] | None:
    count = max(options.least, options.per_place * batch)
    try:
        await worker_round(service, questions.make(batch), MODES[mode], batch)  # warm
    except GuardError as error:
        if error.kind is GuardErrorKind.UNSUPPORTED:
            print(f"{mode}: {error}", flush=True)
            return None
        raise
    ours, theirs, each, tokens, prompt_tokens = [], [], [], 0.0, 0.0
    decoding = []
    for _ in range(options.rounds):
        seconds, latencies, verdicts = await worker_round(service, questions.make(count), MODES[mode], batch)
        ours.append(count / seconds)
        each += latencies
        tokens = statistics.mean(verdict.usage.completion for verdict in verdicts)
        prompts = [prompt for one in questions.make(count) for prompt in plan(render(one), [], engine)]
        prompt_tokens = statistics.mean(len(prompt.ids) for prompt in prompts)
        began = time.perf_counter()
        await bare.generate(prompts, max(1, round(tokens)), batch)
        theirs.append(count / (time.perf_counter() - began))
    long = options.decode_tokens
    same = plan(render(questions.make(1)[0]), [], engine) * batch
    await bare.generate(same, 1, batch)
    for _ in range(options.rounds):
        spent = []
        for length in (1, long + 1):
            began = time.perf_counter()
            await bare.generate(same, length, batch)
            spent.append(time.perf_counter() - began)
        decoding.append(batch * long / max(1e-9, spent[1] - spent[0]))
    each.sort()
    return {
        "mode": mode,
        "batch": batch,
        "verdicts_per_second": statistics.median(ours),
        "bare_per_second": statistics.median(theirs),
        "of_bare": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "tokens_per_verdict": tokens,
        "prompt_tokens": prompt_tokens,
        "p50": each[len(each) // 2],
        "p99": each[min(len(each) - 1, int(0.99 * len(each)))],
        "decode_tokens_per_second": statistics.median(decoding),
    }


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['mode']:<7} batch {row['batch']:>3}: {row['verdicts_per_second']:8.2f} verdicts/s, "
        f"{row['of_bare']:.2f} x bare, {row['tokens_per_verdict']:.0f} tokens, p50 {row['p50'] * 1e3:.0f} ms, "
        f"p99 {row['p99'] * 1e3:.0f} ms, share {row['share']:.2f}, decode share {row['decode_share']:.2f}"
    )


# -- what the machine could do


def machine(device: str) -> dict[str, Any]:
    """Bytes per second of a large copy, both ways counted, operations per second of a large product; best of eight."""
    import torch

    cuda = device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    elements, side = (2**30, 8192) if cuda else (2**25, 1024)

    def rate(work: Callable[[], Any], amount: float) -> float:
        spent = []
        for _ in range(8):
            began = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            spent.append(time.perf_counter() - began)
        return amount / min(spent)

    source = torch.ones(elements, dtype=dtype, device=device)
    target = torch.empty_like(source)
    bandwidth = rate(lambda: target.copy_(source), 2 * elements * source.element_size())
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    product = rate(lambda: left @ right, 2 * side**3)
    name = platform.processor() or platform.machine()
    if cuda:
        name = torch.cuda.get_device_name()
        torch.cuda.empty_cache()
    return {"name": name, "bytes_per_second": bandwidth, "flops": product, "bytes_per_weight": 2 if cuda else 4}


def shares(row: dict[str, Any], engine: Any, machine: dict[str, Any]) -> dict[str, float]:
    config = json.loads((engine._weights.folder / "config.json").read_text())["text_config"]
    hidden, layers, width = config["hidden_size"], config["num_hidden_layers"], machine["bytes_per_weight"]
    key = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    body = layers * (2 * hidden * hidden + 2 * hidden * key + 3 * hidden * config["intermediate_size"])
    head = hidden * config["vocab_size"]
    context = row["prompt_tokens"] + row["tokens_per_verdict"] / 2

    def step(rows: float, length: float) -> float:
        read = (body + head + rows * length * 2 * layers * key) * width / machine["bytes_per_second"]
        return max(read, 2 * rows * (body + head) / machine["flops"])

    # The system turn is in the prefix cache of an engine that has one: the prompt counts without it.
    fresh = row["prompt_tokens"] - len(engine.encoder.opening)
    prefill = 2 * body * fresh / machine["flops"]
    batch = row["batch"]
    ideal = batch / (batch * prefill + row["tokens_per_verdict"] * step(batch, context))
    decode = batch / step(batch, context)
    return {
        "ideal_per_second": ideal,
        "share": row["verdicts_per_second"] / ideal,
        "decode_share": row["decode_tokens_per_second"] / decode,
    }


# -- commands


def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        weights = random_3b(Path(folder)) if options.model == "3b" else resolve(options.model)
        if options.max_new_tokens:
            facts = dataclasses.replace(weights.facts, max_new_tokens=options.max_new_tokens)
            weights = dataclasses.replace(weights, facts=facts)
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        could = machine(device)
        if options.engine == "vllm":
            args: dict[str, Any] = json.loads(options.vllm_args)
            if options.model == "3b":
                args = {"load_format": "dummy", **args}
            engine, bare = vllm_engine(weights, max(options.batches), options.reasoning_tokens, args)
        else:
            engine, bare = transformers_engine(weights, max(options.batches), options.reasoning_tokens)
        rows = asyncio.run(measure(options, engine, bare, could))
    packages = ("torch", "transformers", "vllm")
    found = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}
    asked = {key: value for key, value in vars(options).items() if key not in ("json", "command")}
    report = {"date": time.strftime("%Y-%m-%d"), "versions": found, "machine": could, "options": asked, "rows": rows}
    report["load"] = os.getloadavg()[0]
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def plot(options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    report = json.loads(options.report.read_text())
    figure, (speed, reach) = pyplot.subplots(1, 2, figsize=(11, 4))
    for mode in dict.fromkeys(row["mode"] for row in report["rows"]):
        rows = sorted((row for row in report["rows"] if row["mode"] == mode), key=lambda row: row["batch"])
        batches = [row["batch"] for row in rows]
        (drawn,) = speed.plot(batches, [row["verdicts_per_second"] for row in rows], "o-", label=f"{mode}, worker")
        speed.plot(
            batches, [row["bare_per_second"] for row in rows], "x--", color=drawn.get_color(), label=f"{mode}, bare"
        )
        reach.plot(batches, [row["share"] for row in rows], "o-", color=drawn.get_color(), label=f"{mode}, verdicts")
        reach.plot(
            batches, [row["decode_share"] for row in rows], "x--", color=drawn.get_color(), label=f"{mode}, decoding"
        )
    for axes, title in ((speed, "verdicts per second"), (reach, "share of the roofline")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("questions in flight")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    options_of = report["options"]
    figure.suptitle(f"{options_of['engine']}, {options_of['model']}, {report['machine']['name']}, {report['date']}")
    figure.tight_layout()
    figure.savefig(options.out, dpi=120)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(argv: list[str] | None = None) -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = cli.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="measure")
    one.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    one.add_argument("--model", default="nano", help="nano, a folder, a hub id, or 3b with random weights")
    one.add_argument("--modes", type=lambda text: text.split(","), default=["reason", "label"])
    one.add_argument("--batches", type=_numbers, default=[1, 8], help="questions in flight (default: 1,8)")
    one.add_argument("--words", type=int, default=60, help="of a question's text (default: 60)")
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--per-place", type=int, default=4, help="questions per place in flight and round (default: 4)")
    one.add_argument("--least", type=int, default=16, help="questions per round at least (default: 16)")
    one.add_argument("--reasoning-tokens", type=int, help="fixes the reasoning's length (vllm only)")
    one.add_argument("--max-new-tokens", type=int, help="instead of the model's own")
    one.add_argument("--decode-tokens", type=int, default=64, help="of the measurement of decoding alone (default: 64)")
    one.add_argument("--vllm-args", default="{}", help="vLLM's engine arguments, as JSON")
    one.add_argument("--json", type=Path, metavar="FILE")
    other = commands.add_parser("plot", help="draw a report")
    other.add_argument("report", type=Path)
    other.add_argument("--out", type=Path, required=True)
    options = cli.parse_args(argv)
    (run if options.command == "run" else plot)(options)


if __name__ == "__main__":
    sys.exit(main())
