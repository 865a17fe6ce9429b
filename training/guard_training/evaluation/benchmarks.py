"""The 14 benchmarks of GuardReasoner-VL in the form in which its authors released them, and their table.

Text: ``<Name>.json``, a list of ``{"input": transcript, "output": label}``, where the label is the bare word or an
``Answers:`` block. Images: ``{"messages": [instruction and transcript, block], "images": [path]}``; the pictures lie
beside the file, or come in the order of its rows from ``yueliu1999/GuardReasoner-VLTest`` (label 0 and 1 there are the
two benchmarks, not harm). A transcript is ``Human user:\\n...\\n\\nAI assistant:\\n...``.

Labels count as in the released evaluation: ``None`` in a block and ``harmless`` are unharmful, null is no label, and a
file counts for its own task only (WildGuardTest's prompt file for requests).

Refuses: a name that is none of the 13 files, a file that is no such list. A row that does not fit is left out and
named.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guard_middleware.guard.prompt import ASSISTANT, HUMAN, NO_ANSWER
from guard_middleware.types import Label
from guard_training.corpus.rows import Row, Skipped
from guard_training.evaluation.metrics import Mode, groups, pairs, paper_label
from guard_training.evaluation.outcomes import SIDES, Outcome, Side
from guard_training.evaluation.published import PUBLISHED
from guard_training.evaluation.stats import confusion, figures, percentiles, resample

HUB = "yueliu1999/GuardReasoner-VLTest"
IMAGE = "<image>"


class BenchmarkError(ValueError):
    """A benchmark that cannot be read; the message says what to give instead."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One released file. ``rows`` is the paper's count; ``hub_label`` its label in the data set of images."""

    name: str
    title: str
    sides: tuple[Side, ...]
    rows: int
    hub_label: int | None = None


BENCHMARKS: Mapping[str, Benchmark] = {
    one.name: one
    for one in (
        Benchmark("ToxicChat", "ToxicChat", ("request",), 2853),
        Benchmark("HarmBenchPrompt", "HarmBench", ("request",), 239),
        Benchmark("OpenAIModeration", "OpenAI Moderation", ("request",), 1680),
        Benchmark("AegisSafetyTest", "Aegis SafetyTest", ("request",), 359),
        Benchmark("SimpleSafetyTests", "SimpleSafetyTests", ("request",), 100),
        Benchmark("WildGuardTestPrompt", "WildGuardTest", ("request",), 1756),
        Benchmark("HarmImageTest", "HarmImageTest", ("request",), 3295, hub_label=0),
        Benchmark("SPA_VL_Eval", "SPA-VL-Eval", ("request", "response"), 3282, hub_label=1),
        Benchmark("HarmBenchResponse", "HarmBench", ("response",), 602),
        Benchmark("SafeRLHF", "SafeRLHF", ("response",), 2000),
        Benchmark("BeaverTails", "BeaverTails", ("response",), 3021),
        Benchmark("XSTestReponseHarmful", "XSTest", ("response",), 446),  # spelled so in the release
        Benchmark("WildGuardTestResponse", "WildGuardTest", ("response",), 1768),
    )
}


def find(given: Sequence[str]) -> list[tuple[Benchmark, Path]]:
    """``NAME=FILE`` or a folder that holds files of those names; raises ``BenchmarkError``."""
    found: list[tuple[Benchmark, Path]] = []
    for one in given:
        name, equals, file = one.partition("=")
        if equals:
            if name not in BENCHMARKS:
                raise BenchmarkError(f"{name!r} is no benchmark; give one of {', '.join(BENCHMARKS)}")
            found.append((BENCHMARKS[name], Path(file)))
            continue
        inside = [(known, Path(one) / f"{known.name}.json") for known in BENCHMARKS.values()]
        present = [(known, file) for known, file in inside if file.is_file()]
        if not present:
            raise BenchmarkError(
                f"{one}: no folder with {inside[0][1].name} and the like; give NAME=FILE or that folder"
            )
        found += present
    return found


def read_benchmark(benchmark: Benchmark, file: Path, skipped: Skipped, *, images: Path | None = None) -> list[Row]:
    """The rows of a file, as ``{name}:{number}`` from 0. ``images`` is a folder with the benchmark's pictures, in
    which those that the rows do not name are taken in the order of their names."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BenchmarkError(f"{file}: not JSON ({error}); give the file as the authors released it") from None
    if not isinstance(value, list):
        raise BenchmarkError(f"{file}: not a list of rows; give the file as the authors released it")
    folder = images or file.parent
    ordered = _pictures(folder, benchmark.name) if benchmark.hub_label is not None else []
    rows = []
    for number, raw in enumerate(value):
        try:
            row = _row(benchmark, number, raw)
            if benchmark.hub_label is not None:
                row = dataclasses.replace(row, image=_picture(raw, folder, ordered, number, len(value)))
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            skipped(f"{file.name}: row {number}: {error if isinstance(error, ValueError) else 'not of its form'}")
            continue
        if row.request is not None or row.response_label is not None:
            rows.append(row)
    return rows


def _row(benchmark: Benchmark, number: int, raw: Mapping[str, Any]) -> Row:
    if "messages" in raw:
        content, answer = (one["content"] for one in raw["messages"][:2])
        # the released rows repeat the instruction before the transcript
        transcript = content[content.find(f"\n\n{HUMAN}") + 2 :] if f"\n\n{HUMAN}" in content else content
    else:
        transcript, answer = raw["input"], raw["output"]
    prompt, response = split(transcript)
    labels = {side: label(answer, side) if side in benchmark.sides else None for side in SIDES}
    if response is None:
        if benchmark.sides == ("response",):
            raise ValueError("labels an answer that is not there")
        labels["response"] = None
    return Row(f"{benchmark.name}:{number}", benchmark.name, prompt, labels["request"], response, labels["response"])


def split(transcript: str) -> tuple[str, str | None]:
    """Prompt and answer of a transcript, its image marker taken out; an answer ``None`` is none. Raises ``ValueError``.

    Content may hold the header itself: with no answer the last one is the real one, else the first.
    """
    if not transcript.startswith(HUMAN):
        raise ValueError("its transcript does not start with the user's header")
    body = transcript[len(HUMAN) :]
    prompt, header, response = body.rpartition(ASSISTANT)
    if response.strip() != NO_ANSWER:
        prompt, header, response = body.partition(ASSISTANT)
    if not header:
        raise ValueError("its transcript has no header of the answer")
    if prompt == IMAGE or prompt.startswith(f"{IMAGE}\n"):
        prompt = prompt[len(IMAGE) + 1 :]
    answer = response.rstrip("\n")
    return prompt, None if answer.strip() in ("", NO_ANSWER) else answer


def label(answer: str | None, side: Side) -> Label | None:
    """The label of a side in a bare word or a block; raises ``ValueError`` for anything else."""
    if answer is None:
        return None
    word = answer.strip().lower()
    if word not in ("harmful", "unharmful", "none", "harmless"):
        found = paper_label(answer, side)
        if found is None:
            raise ValueError(f"no label of the {side}")
        return found
    return "harmful" if word == "harmful" else "unharmful"


def _pictures(folder: Path, name: str) -> list[Path]:
    for inside in (folder / "test" / name, folder / name):
        if inside.is_dir():
            return sorted(
                file for file in inside.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
            )
    return []


def _picture(raw: Mapping[str, Any], folder: Path, ordered: Sequence[Path], number: int, total: int) -> Path:
    named = raw.get("images") or [""]
    path = (folder / named[0]).resolve()
    if named[0] and path.is_relative_to(folder.resolve()) and path.is_file():
        return path
    if len(ordered) == total:
        return ordered[number]
    raise ValueError(f"its picture is not in {folder}; give --images a folder of them, or {HUB}")


def fetch_images(source: str, cache: Path | None = None) -> Path:
    """Pictures of the hub's data set (or a folder that ``datasets`` reads as one), written to ``cache/<benchmark>/``
    by their order (default: beside the cache of ``datasets``); what is there is not written again. Raises
    ``BenchmarkError``."""
    from datasets import Image, config, load_dataset

    cache = cache or Path(config.HF_DATASETS_CACHE) / "guard-train" / source.strip("/").replace("/", "--")
    if (cache / "done").exists():
        return cache
    try:
        pictures = load_dataset(source, split="test").cast_column("image", Image(decode=False))
    except Exception as error:
        raise BenchmarkError(f"{source}: no data set of images can be read there ({type(error).__name__})") from None
    names = {one.hub_label: one.name for one in BENCHMARKS.values() if one.hub_label is not None}
    counts = dict.fromkeys(names, 0)
    for picture in pictures:
        image, kind = picture["image"], picture["label"]
        data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        file = cache / names[kind] / f"{counts[kind]:06d}{Path(image['path'] or '.png').suffix.lower()}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        counts[kind] += 1
    (cache / "done").touch()
    return cache


# -- the table


def paper_table(outcomes: Sequence[Outcome], mode: Mode) -> dict[str, Any] | None:
    """F1 of each benchmark and the sample-weighted averages, in per cent with 95 % bootstrap intervals, beside the
    paper's; None where no outcome is of a benchmark. Where a benchmark lacks, ``complete`` is false: the average is
    over those given, and the paper's is not its equal."""
    grouped = {
        (source, side): rows
        for (source, side), rows in groups(outcomes).items()
        if source in BENCHMARKS and side in BENCHMARKS[source].sides
    }
    if not grouped:
        return None
    return {side: _side(grouped, side, mode) for side in PUBLISHED if any(given == side for _, given in grouped)}


def _side(grouped: Mapping[tuple[str, Side], Sequence[Outcome]], side: Side, mode: Mode) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    entries, f1, drawn, weights = [], {}, {}, {}
    for benchmark in BENCHMARKS.values():
        rows = grouped.get((benchmark.name, side))
        if rows is None:
            continue
        counts = confusion(pairs(rows, side, mode))
        # scikit-learn's value where there is nothing to find and nothing was called
        f1[benchmark.name] = 100 * (counts.f1 or 0.0)
        drawn[benchmark.name], weights[benchmark.name] = 100 * figures(resample(counts, rng))["f1"], len(rows)
        entries.append(
            {
                "name": benchmark.name,
                "title": benchmark.title,
                "rows": len(rows),
                "published_rows": benchmark.rows,
                "f1": f1[benchmark.name],
                "interval": percentiles(drawn[benchmark.name]),
            }
        )
    averages = {}
    for average, text_only in (("text", True), ("all", False)):
        wanted = [
            one.name
            for one in BENCHMARKS.values()
            if side in one.sides and not (text_only and one.hub_label is not None)
        ]
        names = [name for name in wanted if name in f1]
        total = sum(weights[name] for name in names)
        if total:
            averages[average] = {
                "f1": sum(f1[name] * weights[name] for name in names) / total,
                "interval": percentiles(np.sum([drawn[name] * weights[name] for name in names], axis=0) / total),
                "complete": len(names) == len(wanted),
            }
    return {"benchmarks": entries, "averages": averages, "published": PUBLISHED[side]}
