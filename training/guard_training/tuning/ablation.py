"""The paper's ablations of online RL, and Eco: one recipe with one part changed at a time, trained, measured, compared.

Every variant is a run of ``guard-train grpo`` in a process of its own (a GPU's memory and vLLM's engine do not outlive
it) in a folder of its own, so a stopped sweep goes on where it stopped: finished variants are not trained again and
rows that were asked about are not asked again. A variant that cannot be trained, or that an alarm stopped, is told
with its reason and the others go on; one with a checkpoint is measured as far as it came. Differences are paired, row
by row, with the full recipe.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from guard_training.corpus.rows import Row
from guard_training.evaluation.metrics import compare, summarise
from guard_training.evaluation.outcomes import Outcome
from guard_training.evaluation.tables import Sheet
from guard_training.process import LAUNCH, run_child
from guard_training.rowfile import write_json
from guard_training.tuning.grpo import GrpoSettings
from guard_training.tuning.run import last_checkpoint

FULL, BEFORE = "full", "before RL"
#: What is changed (paper, ablation study; Eco is beta = 1/6). SFT stays: one modality is of RL's rows alone.
VARIANTS: dict[str, Callable[[GrpoSettings], GrpoSettings]] = {
    FULL: lambda recipe: recipe,
    "no augmentation": lambda recipe: replace(recipe, mixed_rows=False),
    "no dynamic clipping": lambda recipe: replace(recipe, dynamic_clipping=False),
    "no length reward": lambda recipe: replace(recipe, reward=replace(recipe.reward, unit="none")),
    "eco": lambda recipe: replace(recipe, reward=replace(recipe.reward, beta=1 / 6)),
    "text only": lambda recipe: replace(recipe, rows="text"),
    "image only": lambda recipe: replace(recipe, rows="image"),
}
_NOTE = "no augmentation, text only, image only: fewer rows, so fewer rollouts than the full recipe has"
_ALARM = "stopped by an alarm"

Train = Callable[[GrpoSettings, Path], str | None]
Ask = Callable[[str, Path], list[Outcome]]


@dataclass(frozen=True, slots=True)
class Result:
    """One variant. ``note`` is why it was not trained to its end, ``difference`` is to the full recipe."""

    variant: str
    summary: dict[str, Any] | None
    difference: dict[str, Any] | None = None
    note: str | None = None


def folder_of(output: Path, variant: str) -> Path:
    """Where a variant's run lies."""
    return output / variant.replace(" ", "-")


def trainer(rows: Path, model: str, launch: Sequence[str] = LAUNCH) -> Train:
    """Trains a variant in a process of its own; gives None, or the reason why it did not come to its end.

    A finished one is started too: ``grpo`` alone knows whether the folder is of this recipe, these rows and weights.
    """

    def train(recipe: GrpoSettings, folder: Path) -> str | None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(asdict(recipe), sort_keys=False), encoding="utf-8")
        command = [*launch, "grpo", "--rows", str(rows), "--model", model, "--recipe", str(file)]
        with (folder / "log.txt").open("a+b") as log:
            begun = log.seek(0, os.SEEK_END)
            status = run_child([*command, "--output", str(folder)], log)
            log.seek(begun)
            said = log.read().decode(errors="replace").strip().splitlines()
        if status == 0:
            return None
        told = [line for line in said if line.startswith("guard-train: ")]
        return told[-1].removeprefix("guard-train: ") if told else f"{said[-1] if said else 'no word'} (see log.txt)"

    return train


def run(
    recipe: GrpoSettings,
    model: str,
    output: Path,
    variants: Sequence[str],
    *,
    train: Train,
    ask: Ask,
) -> list[Result]:
    """Trains and measures the variants, in order; ``ask`` measures a guard with its journal in a folder."""
    outcomes: dict[str, list[Outcome]] = {BEFORE: ask(model, output / "before-RL")}
    notes: dict[str, str | None] = {}
    for variant in track(variants, "variants"):
        folder = folder_of(output, variant)
        try:
            notes[variant] = train(VARIANTS[variant](recipe), folder)
        except ValueError as error:
            notes[variant] = str(error)
        guard = str(folder / "model") if notes[variant] is None else _as_far_as_it_came(folder, notes[variant])
        if guard:
            outcomes[variant] = ask(guard, folder)
    full = outcomes.get(FULL)
    results = []
    for variant in (BEFORE, *variants):
        found = outcomes.get(variant)
        summary = summarise(found, model=variant, revision=found[0].revision) if found else None
        difference = compare(found, full)["means"] if found and full and variant != FULL else None
        results.append(Result(variant, summary, difference, notes.get(variant)))
    return results


def _as_far_as_it_came(folder: Path, note: str | None) -> str | None:
    found = last_checkpoint(folder) if note and _ALARM in note else None
    return str(found) if found else None


def sheet(results: Sequence[Result]) -> Sheet:
    """Per cent with 95 % intervals; the difference in mean F1 is paired."""
    columns = ("variant", "mean F1", "recall", "false positives", "format", "reasoning tokens", "F1 to full")
    return Sheet("Ablations of online RL: per cent, with 95 % intervals", columns, tuple(map(_cells, results)), _NOTE)


def _cells(one: Result) -> tuple[str, ...]:
    if one.summary is None:
        return one.variant, f"not trained: {one.note}", *[""] * 5
    means, tokens = one.summary["means"], one.summary["mean_reasoning_tokens"]
    return (
        f"{one.variant} (stopped by an alarm)" if one.note else one.variant,
        *(_cell(means[name]) for name in ("f1", "recall", "false_positive_rate")),
        _cell(one.summary["format_compliance"]),
        "-" if tokens is None else f"{tokens:.1f}",
        _cell((one.difference or {}).get("f1"), "difference", "+"),
    )


def _cell(figure: Mapping[str, Any] | None, key: str = "value", sign: str = "") -> str:
    if not figure or figure.get(key) is None:
        return "-"
    interval = figure.get("interval")
    spread = f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
    return f"{100 * figure[key]:{sign}.1f}{spread}"


def write(results: Sequence[Result], recipe: GrpoSettings, output: Path) -> list[Path]:
    """``ablations.json``, and the plot as SVG and PNG; gives their paths."""
    output.mkdir(parents=True, exist_ok=True)
    value = {"recipe": asdict(recipe), "variants": [asdict(one) for one in results]}
    files = [output / f"ablations.{kind}" for kind in ("json", "svg", "png")]
    write_json(files[0], value)
    figure = plot(results)
    for file in files[1:]:
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files


def plot(results: Sequence[Result]) -> Figure:
    """Mean F1 (with its interval), false positives, format compliance and reasoning tokens of every variant."""
    shown = [one for one in results if one.summary is not None]
    panels: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("mean F1", lambda s: s["means"]["f1"]),
        ("false positives", lambda s: s["means"]["false_positive_rate"]),
        ("format compliance", lambda s: s["format_compliance"]),
        ("reasoning tokens", lambda s: s["mean_reasoning_tokens"]),
    ]
    with mpl.rc_context({"font.size": 9, "svg.hashsalt": "guard", "axes.grid": True, "grid.color": "#dddddd"}):
        figure = Figure(figsize=(11, 1.2 + 0.4 * max(2, len(shown))), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True)
        for panel, (title, get) in zip(axes, panels, strict=True):
            panel.set(title=title if title.endswith("tokens") else f"{title}, per cent")
            for y, one in enumerate(shown):
                _dot(panel, y, get(one.summary or {}), "#D55E00" if one.variant in (FULL, BEFORE) else "#0072B2")
        axes[0].set_yticks(range(len(shown)), [f"{one.variant}{' (alarm)' if one.note else ''}" for one in shown])
        axes[0].invert_yaxis()
    return figure


def _dot(panel: Any, y: int, figure: Any, colour: str) -> None:
    if figure is None:
        return
    if isinstance(figure, int | float):
        panel.plot([figure], [y], "o", ms=4, color=colour)
        return
    value, interval = 100 * figure["value"], figure.get("interval")
    spread = [[max(0.0, value - 100 * interval[0])], [max(0.0, 100 * interval[1] - value)]] if interval else None
    panel.errorbar([value], [y], xerr=spread, fmt="o", ms=4, lw=1, color=colour)


def asker(rows: Sequence[Row], *, concurrency: int, console: Console) -> Ask:
    """Asks a guard's own worker about the rows, with a journal in the variant's folder."""
    from guard_training.evaluation.measure import measure

    def ask(model: str, folder: Path) -> list[Outcome]:
        journal = folder / "outcomes.journal"
        return measure(rows, model, concurrency=concurrency, console=console, journal=journal)

    return ask
