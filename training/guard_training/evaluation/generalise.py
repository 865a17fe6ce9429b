"""Leave-one-source-out: how a guard judges a kind of content that it never trained on.

Harmful and harmless rows seldom share a source, so a guard can learn how a source writes. Per fold one source, or a
group of them, is left out of the recipe (``exclude``), a guard is trained without it, and it is asked about the rows
left out. Beside it stands the baseline of ``guard-train baseline`` on the same training texts (see ``tfidf``); a guard
that does not beat it has learnt words.

Requests only. Recall and false positives are at the guard's own operating point (0.5 for the baseline). The area
under the ROC curve needs both labels: where a group holds one only, it is taken against held-out rows of the other
label from sources that *were* trained on, and says so; it is then easier than a source nobody saw.

Refuses: a group with a source that the recipe's files do not hold, or whose absence leaves one label untrained; a fold
begun with another recipe, other data or other options.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from guard_training.corpus.rows import Row, Skipped, read_good_rows, sample
from guard_training.evaluation import plots
from guard_training.evaluation.curves import area_interval, curve
from guard_training.evaluation.measure import measure
from guard_training.evaluation.perturb import subjects
from guard_training.evaluation.report import present
from guard_training.evaluation.stats import Rate, mean_json, rate_json
from guard_training.evaluation.tables import Sheet, cell
from guard_training.evaluation.tfidf import fit
from guard_training.journal import Journal
from guard_training.nano.recipe import Recipe
from guard_training.process import LAUNCH, run_child
from guard_training.rowfile import begin, digest

#: Labelled requests that a source must have to be a fold of its own by default.
LEAST = 50


class GeneraliseError(ValueError):
    """A fold that cannot be made; the message says what to give instead."""


@dataclass(frozen=True, slots=True)
class Fold:
    """One group of sources left out: texts to train on, rows of the group, and unseen rows of the other sources."""

    group: tuple[str, ...]
    train: tuple[Row, ...]
    left_out: tuple[Row, ...]
    seen: tuple[Row, ...]

    @property
    def name(self) -> str:
        return "+".join(self.group)


@dataclass(frozen=True, slots=True)
class Said:
    """A guard's answer to one row: P(harmful) 0..1 and its call, both None for an error."""

    score: float | None
    harmful: bool | None


def read_groups(data: Path, recipe: Recipe, stated: Sequence[str] | None, skipped: Skipped) -> list[tuple[str, ...]]:
    """``source`` or ``source+source`` as groups; by default every source with ``LEAST`` labelled requests. Bad lines
    go to ``skipped``."""
    rows = [row for name in recipe.files for row in subjects(read_good_rows(data / name, skipped), "request")]
    sizes = Counter(row.source for row in rows if row.source not in recipe.exclude)
    if not stated:
        return [(source,) for source, count in sorted(sizes.items()) if count >= LEAST]
    groups = [tuple(part for part in group.split("+") if part) for group in stated]
    for source in (source for group in groups for source in group):
        if source not in sizes:
            raise GeneraliseError(
                f"{source}: no labelled request of this source in {', '.join(recipe.files)}; "
                f"the sources are {', '.join(sorted(sizes))}"
            )
    return groups


def make_fold(data: Path, recipe: Recipe, group: tuple[str, ...], *, limit: int | None, seed: int) -> Fold:
    """Rows as nano's own pipeline reads them, with and without the group. Raises ``GeneraliseError``."""
    from guard_training.nano.rows import load_rows

    told = Skipped()  # read_groups has said it
    everything = load_rows(data, recipe, told)
    rows = load_rows(data, dataclasses.replace(recipe, exclude=[*recipe.exclude, *group]), told)
    left_out = [row for row in [*everything.prompts, *everything.held_out] if row.source in group]
    missing = {"harmful", "unharmful"} - {row.request for row in rows.prompts}
    if missing:
        raise GeneraliseError(f"without {'+'.join(group)} no {' and no '.join(sorted(missing))} request is left")
    return Fold(
        group,
        tuple(rows.prompts),
        tuple(sample(subjects(left_out, "request"), limit, seed)),
        tuple(sample(subjects(rows.held_out, "request"), limit, seed)),
    )


def linear(fold: Fold) -> list[Said]:
    """The baseline's answers to the group's rows and then to the seen ones, at one half. Raises ``BaselineError``."""
    side = fit([(row.prompt, row.source, row.request == "harmful") for row in fold.train])
    scores = side.scores([row.prompt for row in (*fold.left_out, *fold.seen)])
    return [Said(float(score), bool(score >= side.threshold)) for score in scores]


def train_guard(data: Path, recipe: Recipe, fold: Fold, folder: Path, options: Sequence[str] = ()) -> Path:
    """Trains nano without the group in a process of its own, whose bar and words go to this terminal; goes on where it
    was. Returns the model's folder.

    ``options`` are further ones of ``guard-train nano``. Raises ``GeneraliseError`` where it fails and ``OutputError``
    for a fold that was begun with another recipe, other data or other options.
    """
    run, file = folder / "run", folder / "recipe.yaml"
    without = dataclasses.asdict(dataclasses.replace(recipe, exclude=[*recipe.exclude, *fold.group]))
    begin(run, {**without, "data": _digests(data, recipe), "options": list(options)})
    finished = run / "finished"
    if not finished.exists():
        file.write_text(yaml.safe_dump(without, sort_keys=False), encoding="utf-8")
        arguments = ["nano", "--data", str(data), "--output", str(run), "--recipe", str(file), *options]
        status = run_child([*LAUNCH, *arguments])
        if status:
            raise GeneraliseError(
                f"training without {fold.name} stopped (exit {status}); see above, the same command goes on"
            )
        finished.touch()
    return run / "model"


def _digests(data: Path, recipe: Recipe) -> list[str]:
    return [digest(data / name) for name in recipe.files]


def ask_guard(model: Path, fold: Fold, folder: Path, *, concurrency: int, console: Console) -> list[Said]:
    """The trained guard's answers to the group's rows and then to the seen ones."""
    rows = [*fold.left_out, *fold.seen]
    said = measure(rows, str(model), concurrency=concurrency, console=console, journal=folder / "answers.jsonl")
    return [Said(one.request_score, None if one.request is None else one.request == "harmful") for one in said]


def figures(fold: Fold, said: Sequence[Said]) -> list[dict[str, Any]]:
    """One entry per source of the group: recall, false positives, area under the ROC curve."""
    own, others = said[: len(fold.left_out)], said[len(fold.left_out) :]
    group = list(zip(fold.left_out, own, strict=True))
    seen = list(zip(fold.seen, others, strict=True))
    entries = []
    for source in fold.group:
        pairs = [(row, one) for row, one in group if row.source == source]
        calls = {
            label: [one.harmful for row, one in pairs if row.request == label] for label in ("harmful", "unharmful")
        }
        entries.append(
            {
                "source": source,
                "rows": len(pairs),
                # An error is wrong either way.
                "recall": rate_json(Rate(sum(call is True for call in calls["harmful"]), len(calls["harmful"]))),
                "false_positive_rate": rate_json(
                    Rate(sum(call is not False for call in calls["unharmful"]), len(calls["unharmful"]))
                ),
                "errors": sum(one.harmful is None for _, one in pairs),
                "auc": _auc(pairs, group, seen),
            }
        )
    return entries


def _auc(
    pairs: Sequence[tuple[Row, Said]], group: Sequence[tuple[Row, Said]], seen: Sequence[tuple[Row, Said]]
) -> dict[str, Any] | None:
    labels = {row.request for row, _ in pairs}
    pools = {"itself": pairs, "the group": group, "seen sources": seen}
    others = {name: [one for one in pool if one[0].request not in labels] for name, pool in pools.items()}
    against = next((name for name, pool in others.items() if pool), "itself")
    used = [*pairs, *others[against]]
    known = [(row.request == "harmful", one.score) for row, one in used if one.score is not None]
    truth, scores = [is_ for is_, _ in known], [score for _, score in known]
    found = curve(truth, scores) if known else None
    if found is None:
        return None
    return {
        "value": found.area,
        "interval": area_interval(truth, scores) or (0.0, 1.0),
        "n": len(known),
        "against": against,
    }


def generalise(
    data: Path,
    recipe: Recipe,
    output: Path,
    *,
    groups: Sequence[str] | None,
    quick: bool,
    limit: int | None,
    options: Sequence[str] = (),
    concurrency: int = 12,
    seed: int = 0,
    console: Console,
) -> dict[str, Any]:
    """Every fold by the baseline and, unless ``quick``, by a trained guard; prints the table, returns the figures.

    ``output`` gets ``folds.jsonl`` (figures of the folds done, which are not done again), a folder per trained fold
    and ``report.json`` and ``report.html``. Raises ``GeneraliseError``.
    """
    skipped = Skipped()
    folds = read_groups(data, recipe, groups, skipped)
    if not folds:
        raise GeneraliseError(f"no source has {LEAST} labelled requests; name some with --groups; {skipped.summary()}")
    settings = [dataclasses.asdict(recipe), _digests(data, recipe), limit, seed, quick, list(options)]
    with Journal(output / "folds.jsonl") as journal:
        keys = [hashlib.sha256(json.dumps([settings, group]).encode()).hexdigest()[:32] for group in folds]
        for number, (group, key) in enumerate(zip(folds, keys, strict=True), 1):
            if key in journal.done:
                continue
            with Progress(console=console) as progress:
                task = progress.add_task(f"fold {number} of {len(folds)}: {escape('+'.join(group))}", total=2)
                fold = make_fold(data, recipe, group, limit=limit, seed=seed)
                progress.advance(task)
                said = {"linear": linear(fold)}
                progress.advance(task)
            if not quick:
                folder = output / "folds" / fold.name
                console.print(f"training without {fold.name}", markup=False)
                model = train_guard(data, recipe, fold, folder, options)
                said[recipe.name] = ask_guard(model, fold, folder, concurrency=concurrency, console=console)
            found = [
                {"model": name, "group": fold.name, **entry}
                for name, own in said.items()
                for entry in figures(fold, own)
            ]
            journal.append({"id": key, "entries": found})
        known = {line["id"]: line["entries"] for line in journal}
    entries = [entry for key in keys for entry in known[key]]
    report: dict[str, Any] = {
        "files": recipe.files,
        "recipe": recipe.name,
        "limit": limit,
        "seed": seed,
        "entries": entries,
        "means": [
            {"model": model, **_means([entry for entry in entries if entry["model"] == model])}
            for model in dict.fromkeys(entry["model"] for entry in entries)
        ],
    }
    by_guard = {
        mean["model"]: {"sources": [{**one, "side": ""} for one in entries if one["model"] == mean["model"]]}
        for mean in report["means"]
    }
    present(
        report,
        _sheet(report),
        facts=[("Data", ", ".join(recipe.files)), ("Recipe", recipe.name), ("Rows", f"at most {limit} of a source")],
        caption="Recall and false positives on sources left out, with 95 % intervals",
        draw=partial(plots.rates, by_guard),
        skipped=skipped,
        console=console,
        json_file=output / "report.json",
        page_file=output / "report.html",
    )
    return report


def _means(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over sources, every source alike."""
    return {
        name: mean_json([entry[name]["value"] for entry in entries if entry[name]], most=1.0)
        for name in ("recall", "false_positive_rate", "auc")
    }


def _sheet(report: Mapping[str, Any]) -> Sheet:
    columns = (
        "left out", "source", "guard", "rows", "recall", "false positives", "area (ROC)", "against", "errors",
    )  # fmt: skip
    rows = [
        (
            entry["group"],
            entry["source"],
            entry["model"],
            str(entry["rows"]),
            cell(entry["recall"]),
            cell(entry["false_positive_rate"]),
            cell(entry["auc"]),
            entry["auc"]["against"] if entry["auc"] else "-",
            str(entry["errors"] or "-"),
        )
        for entry in report["entries"]
    ]
    for mean in report["means"]:
        figures = (cell(mean[name]) for name in ("recall", "false_positive_rate", "auc"))
        rows.append(("mean over sources", "", mean["model"], "", *figures, "", ""))
    title = "sources left out of training: per cent with 95 % intervals"
    return Sheet(title, columns, tuple(rows), left=3, totals=len(report["means"]))
