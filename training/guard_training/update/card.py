"""A whole model card (README.md) from what is known: the guard's own files, its lineage and measured results.

Nothing in it is claimed that is not in those; the limits are the operator's text, or ones that hold for every guard.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from guard_middleware.worker.calibration import KINDS
from guard_middleware.worker.weights import ModelFacts, load
from guard_training.corpus.rows import Row
from guard_training.evaluation.card import BEGIN, END, results
from guard_training.evaluation.outcomes import SIDES
from guard_training.evaluation.tables import Sheet

LIMITS = """\
- It is one layer of defence, not a safety product: an adversary who knows it will get round it.
- It was measured on the data above and on nothing else; on other content, in other languages and on other kinds of
  picture, measure it before you rely on it. Read the false positives before you block with it.
- What is harmful differs between the sources of the labels. Do not average over them.
- Its reasoning need not be the cause of its verdict (`guard-train audit` measures how far it is).
"""


class CardError(ValueError):
    """A card that cannot be made; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """Rows of one source that were trained on, by the label of the request (or of the answer, where only that is)."""

    source: str
    rows: int
    harmful: int
    licences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What was done, as text above a table of constants."""

    text: str
    constants: Mapping[str, Any] = field(default_factory=dict)


def count_sources(rows: Iterable[Row]) -> list[SourceFacts]:
    """Rows by source, sorted."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.source].append(row)
    return [
        SourceFacts(
            source,
            len(found),
            sum((row.request or row.response_label) == "harmful" for row in found),
            tuple(sorted({row.licence for row in found if row.licence})),
        )
        for source, found in sorted(groups.items())
    ]


def parameters(folder: Path) -> int:
    """Numbers in the safetensors files."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                size = 1
                for side in file.get_slice(name).get_shape():
                    size *= side
                total += size
    return total


def licence_of(folder: Path) -> str | None:
    """The licence that a folder's card states."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    _, _, rest = card.read_text("utf-8").partition("---\n")
    try:
        value = yaml.safe_load(rest.partition("\n---")[0])
        return str(value["license"])
    except (yaml.YAMLError, KeyError, TypeError):
        return None


def write_card(
    guard: Path,
    *,
    licence: str,
    sources: Sequence[SourceFacts],
    recipe: Recipe,
    summaries: Sequence[Mapping[str, Any]],
    base: str | None = None,
    data_note: str = "",
    changes: Sequence[Sheet] = (),
    calibration: Mapping[str, Any] | None = None,
    limits: str | None = None,
) -> str:
    """The card's text. ``summaries`` are evaluate's JSON of exactly these weights, at least one: else ``CardError``."""
    facts = load(guard, name=guard.resolve().name).facts
    if not summaries:
        raise CardError("a card needs measured results; run `guard-train evaluate --json FILE` first")
    for summary in summaries:
        if summary.get("revision") != facts.revision:
            raise CardError(
                f"the results on {summary.get('data')} are of revision {summary.get('revision')}, the weights are "
                f"{facts.revision}; measure these"
            )
    parts = [
        _front(licence, base),
        f"# {facts.name}\n\nA reasoning guard: it reads a request (and an answer), writes its reasoning in steps, and "
        "gives a verdict in GuardReasoner-VL's format. Made with `guard-train`.",
        _facts(guard, facts, base),
        _data(sources, data_note),
        _recipe(recipe),
        _results(summaries),
        *(f"## {sheet.title}\n\n{sheet.markdown()}\n\n{sheet.note}".rstrip() for sheet in changes),
        _calibration(calibration),
        f"## Limits\n\n{(limits or LIMITS).strip()}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(licence: str, base: str | None) -> str:
    value: dict[str, Any] = {"license": licence, "pipeline_tag": "text-classification"}
    if base and "/" in base:
        value["base_model"] = base
    value["tags"] = ["moderation", "guardrail", "reasoning", "qwen2_5_vl"]
    return f"---\n{yaml.safe_dump(value, sort_keys=False)}---"


def _facts(guard: Path, facts: ModelFacts, base: str | None) -> str:
    config = json.loads((guard / "config.json").read_text("utf-8"))
    text, vision = config.get("text_config", config), config.get("vision_config", {})
    count = parameters(guard)
    numbers = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    window = f"{facts.window_tokens} tokens; longer content is judged in overlapping windows, the worst verdict wins"
    table = {
        "Architecture": f"Qwen2.5-VL: {text.get('num_hidden_layers')} layers of {text.get('hidden_size')}, "
        f"{text.get('num_attention_heads')} heads; {vision.get('depth')} vision layers of {vision.get('hidden_size')}",
        "Parameters": f"{numbers}, {config.get('dtype') or config.get('torch_dtype') or text.get('dtype')}",
        "Tokenizer": f"{text.get('vocab_size')} ids",
        "Images": f"{facts.min_pixels // 784} to {facts.max_pixels // 784} image tokens; words drawn in them "
        + ("come from the reader too" if facts.reader else "are read by the model itself"),
        "Window": window if facts.window_tokens else f"{facts.max_input_tokens} tokens",
        "Output": f"at most {facts.max_new_tokens} tokens"
        + ("; the worker lets it fill in a form (`guard.json`)" if facts.form else ""),
        "Revision": f"`{facts.revision}`",
        **({"Base": f"`{base}`"} if base else {}),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in table.items())])


def _data(sources: Sequence[SourceFacts], note: str) -> str:
    rows = tuple(
        (one.source, ", ".join(one.licences) or "not stated", str(one.rows), str(one.harmful)) for one in sources
    )
    table = Sheet("", ("source", "licence", "rows", "harmful"), rows, left=2).markdown() if rows else ""
    return "\n\n".join(part for part in ("## Data", note, table) if part) if note or table else ""


def _recipe(recipe: Recipe) -> str:
    rows = tuple((f"`{name}`", f"`{json.dumps(value)}`") for name, value in recipe.constants.items())
    table = Sheet("", ("constant", "value"), rows, left=2).markdown() if rows else ""
    return "\n\n".join(part for part in ("## Recipe", recipe.text, table) if part)


def _results(summaries: Sequence[Mapping[str, Any]]) -> str:
    measured = "\n\n".join(results(dict(summary)) for summary in summaries)
    return (
        "## Results\n\nGreedy verdicts, through the worker as it serves. A guard error counts as wrong. Labels mean "
        f"different things in different sources: do not average.\n\n{BEGIN}\n{measured}\n{END}"
    )


def _calibration(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    lines = []
    for kind, side in ((kind, side) for kind in KINDS if kind in found for side in SIDES):
        one = found[kind].get(side)
        if one is None:
            lines.append(f"- {side}, mode {kind}: too few held-back rows, so its scores are not calibrated.")
        else:
            before, after = one["calibration_error"]
            shift = f", shift {one['shift']:.2f}" if one.get("shift") else ""
            lines.append(
                f"- {side}, mode {kind}: temperature {one['temperature']:.2f}{shift} on {one['rows']} held-back rows "
                f"({one['harmful']} harmful); expected calibration error {before:.3f} before, {after:.3f} after."
            )
    scale = "`calibration.json`; a score is sigmoid((logit + shift) / temperature)."
    return "\n".join(["## Calibration", "", scale, "", *lines])
