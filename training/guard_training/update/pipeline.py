"""The whole update: corrections to lessons, R-SFT (and RL), both guards measured on the same rows, gate, revision.

Everything lies in one folder and each step goes on where it was stopped: ``guard.jsonl`` and ``current.jsonl`` /
``new.jsonl`` (what guards were asked), ``lessons.jsonl``, ``sft/``, ``rl/``, ``results/``, ``update.json`` (what the
gate found), ``report.html``, and, if it is accepted, ``revision/``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from guard_middleware.types import REASON, Judging
from guard_middleware.weights import manifest
from guard_middleware.worker.weights import ModelFacts, resolve
from guard_training.corpus.conversation import judgeable, usable
from guard_training.corpus.leakage import Fingerprints, readable
from guard_training.corpus.rows import Row, Skipped, distinct, read_good_rows, sample
from guard_training.evaluation.measure import identity
from guard_training.evaluation.metrics import compare, summarise
from guard_training.evaluation.outcomes import Outcome
from guard_training.evaluation.report import render, write_report
from guard_training.nano.drawn import DrawnText, Read
from guard_training.nano.teacher import form
from guard_training.rowfile import begin, digest, write_json
from guard_training.tuning.grpo import GrpoSettings
from guard_training.tuning.settings import SftSettings
from guard_training.update import gate, revision
from guard_training.update.calibration import calibration, kinds
from guard_training.update.card import Recipe, SourceFacts, count_sources, licence_of, write_card
from guard_training.update.corrections import SOURCE, agreed, read_corrections, read_log
from guard_training.update.lessons import (
    Origin,
    Said,
    fit_lexicon,
    held_back,
    replay,
    with_rationales,
    without_leaks,
    write_lessons,
)
from guard_training.update.train import LESSONS, write_stage

#: Rows that the scores are calibrated on, at most.
_CALIBRATION_ROWS = 600

#: Makes the guard of the prepared folder and returns its place.
Train = Callable[["Plan"], Path]
#: What a guard says about rows: (rows, model, journal, how it is asked) -> outcomes in order.
Measure = Callable[[Sequence[Row], str, Path, Judging], list[Outcome]]


class UpdateError(ValueError):
    """An update that cannot be done; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What an update is made of. ``replay_share`` is the share of older rows among all lessons."""

    model: str
    corrections: tuple[Path, ...]
    replay: tuple[Path, ...]
    evaluation: tuple[Path, ...]
    golden: Path
    output: Path
    sft: SftSettings
    rl: GrpoSettings | None = None
    logs: tuple[Path, ...] = ()
    replay_share: float = 0.8
    limit: int | None = None
    margin: float = 0.02
    allow_chance: bool = False
    made: str = ""
    licence: str | None = None
    limits: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.replay_share < 1:
            raise UpdateError("--replay-share is the share of older rows among all lessons: from 0 to below 1")
        if self.margin < 0:
            raise UpdateError("--margin must not be negative")
        if self.replay_share and not self.replay:
            raise UpdateError("no --replay FILE to draw the replay share from; a guard forgets without it")

    def files(self) -> list[tuple[str, Path]]:
        """Every data file with what it is for."""
        named = (("corrections", self.corrections), ("decision log", self.logs), ("replay", self.replay))
        found = [(role, path) for role, paths in named for path in paths]
        return [*found, *(("evaluation", path) for path in self.evaluation), ("golden set", self.golden)]

    def settings(self) -> dict[str, Any]:
        """What decides the weights: a resumed command must repeat it. Margin and texts of the card may change."""
        files = [[role, digest(path)] for role, path in self.files()]
        return {
            "model": resolve(self.model).facts.revision,
            "files": files,
            "replay_share": self.replay_share,
            "sft": asdict(self.sft),
            "rl": asdict(self.rl) if self.rl else None,
        }


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the training begins with, and the rows that both guards are measured on."""

    lessons: list[Row]
    origins: Mapping[Origin, int]
    reviewers: int
    corrected: list[Row]
    calibration: list[Row]
    evaluation: Mapping[Path, list[Row]]
    golden: list[Row]


def run(
    plan: Plan,
    *,
    console: Console,
    skipped: Skipped,
    train: Train,
    measure: Measure,
    ask: Callable[[Sequence[Row], str, Path], Mapping[str, Said]],
    read: Read | None = None,
) -> Path:
    """Updates the guard and returns the folder of the new revision. Raises ``UpdateRefused`` where the gate is
    shut, ``WorkerFailed`` where a guard cannot be asked."""
    for _, path in plan.files():
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
    identity(plan.model)
    begin(plan.output / "update", plan.settings())
    target = plan.output / "revision"
    if target.is_dir():
        console.print(f"{target} is finished", markup=False, highlight=False)
        return target
    prepared = prepare(plan, console=console, skipped=skipped, ask=ask, read=read)
    new = train(plan)
    console.print(f"new guard: {new}", markup=False, highlight=False)
    asked = [*(row for rows in prepared.evaluation.values() for row in rows), *prepared.golden, *prepared.corrected]
    before = {one.id: one for one in measure(asked, plan.model, plan.output / "current.jsonl", REASON)}
    after = {one.id: one for one in measure(asked, str(new), plan.output / "new.jsonl", REASON)}
    return conclude(plan, prepared, new, before, after, measure=measure, console=console)


def prepare(
    plan: Plan,
    *,
    console: Console,
    skipped: Skipped,
    ask: Callable[[Sequence[Row], str, Path], Mapping[str, Said]],
    read: Read | None,
) -> Prepared:
    """Reads everything, makes the lessons and writes them down."""

    def shown(rows: Sequence[Row], what: str) -> Any:
        return track(rows, what, console=console, transient=True, disable=not console.is_terminal)

    log = read_log(plan.logs, skipped) if plan.logs else None
    corrections = [one for path in plan.corrections for one in read_corrections(path, skipped, log)]
    with Fingerprints(plan.output / "fingerprints.jsonl") as prints:

        def good(rows: Sequence[Row]) -> list[Row]:
            return readable(rows, prints, skipped, shown)

        # agreement compares the images' bytes, so they have to be there
        whole = {row.id for row in judgeable(good([one.lesson for one in corrections]), skipped)}
        kept = agreed([one for one in corrections if one.lesson.id in whole], skipped)
        evaluation = {path: good(read_good_rows(path, skipped)) for path in plan.evaluation}
        golden = good(read_good_rows(plan.golden, skipped))
        measured = _askable(evaluation, plan.limit, skipped)
        kept_golden = usable([replace(row, id=f"golden:{row.id}") for row in golden], skipped)
        if not any(measured.values()) or not kept_golden:
            raise UpdateError(f"no usable row in the evaluation files or in the golden set; {skipped.summary()}")
        older = distinct([row for path in plan.replay for row in read_good_rows(path, skipped)], skipped)
        against = {path.name: rows for path, rows in evaluation.items()}
        against = {**against, f"the golden set {plan.golden.name}": golden}
        corrected = without_leaks([one.lesson for one in kept], against, skipped, fingerprints=prints, track=shown)
        if not corrected:
            raise UpdateError(f"no correction can be learnt from; {skipped.summary()}")
        count = round(len(corrected) * plan.replay_share / (1 - plan.replay_share))
        # as many again as are wanted, since those that an evaluation set holds go out
        chosen = replay(older, corrected, 2 * count, plan.sft.seed)
        kept_back = held_back(older, _CALIBRATION_ROWS, plan.sft.seed)
        wanted = judgeable(good([*chosen, *kept_back]), skipped)
        clean = without_leaks(wanted, against, skipped, fingerprints=prints, track=shown)
    ids = {row.id for row in clean}
    replayed = replay([row for row in chosen if row.id in ids], [], count, plan.sft.seed)
    if len(replayed) < count:
        console.print(f"only {len(replayed)} of {count} replay rows could be had", highlight=False)
    lexicon = None
    if resolve(plan.model).facts.form == form():
        texts = [row for row in [*older, *corrected] if not row.image]
        lexicon = fit_lexicon(without_leaks(texts, against, Skipped(), track=shown))
    drawn = DrawnText(plan.output / "drawn.jsonl", read) if read else None
    lessons, origins = with_rationales(
        [*corrected, *replayed],
        skipped,
        ask=lambda rows: ask(rows, plan.model, plan.output / "guard.jsonl"),
        lexicon=lexicon,
        read=drawn,
    )
    labelled = [row for row in lessons if row.source == SOURCE]
    if not labelled:
        raise UpdateError(f"no correction can be learnt from; {skipped.summary()}")
    write_lessons(lessons, plan.output / LESSONS)
    write_stage(plan.output, replace(plan.sft, model=plan.model))
    said = ", ".join(f"{count} {origin}" for origin, count in sorted(origins.items()))
    console.print(f"{len(labelled)} corrections and {len(lessons) - len(labelled)} replay rows; rationales: {said}")
    return Prepared(
        lessons,
        origins,
        len({one.reviewer for one in kept}),
        [row for row in labelled if not getattr(row, "messages", "")],
        [replace(row, id=f"calibration:{row.id}") for row in kept_back if row.id in ids],
        measured,
        kept_golden,
    )


def _askable(files: Mapping[Path, Sequence[Row]], limit: int | None, skipped: Skipped) -> dict[Path, list[Row]]:
    """At most ``limit`` rows of a source; an id counts once over all files."""
    named = {row.id: path for path, rows in reversed(list(files.items())) for row in rows}
    kept = usable([row for rows in files.values() for row in rows], skipped)
    return {path: sample([row for row in kept if named[row.id] == path], limit) for path in files}


def conclude(
    plan: Plan,
    prepared: Prepared,
    new: Path,
    before: Mapping[str, Outcome],
    after: Mapping[str, Outcome],
    *,
    measure: Measure,
    console: Console,
) -> Path:
    """Report, gate, calibration, revision."""
    measured = [row.id for rows in prepared.evaluation.values() for row in rows]
    golden = [row.id for row in prepared.golden]
    verdict = gate.judge(
        [before[id] for id in measured],
        [after[id] for id in measured],
        [before[id] for id in golden],
        [after[id] for id in golden],
        margin=plan.margin,
        allow_chance=plan.allow_chance,
    )
    learnt = {"rows": len(prepared.corrected), "before": 0, "after": 0}
    for row in prepared.corrected:
        wanted = row.response_label or row.request
        side: Any = "response" if row.response_label else "request"
        learnt["before"] += before[row.id].called(side) == wanted
        learnt["after"] += after[row.id].called(side) == wanted
    facts = resolve(str(new)).facts
    summaries = {path: _summary(plan, path, rows, after, facts) for path, rows in prepared.evaluation.items()}
    for path, summary in summaries.items():
        write_json(plan.output / "results" / f"{_stem(path)}.json", summary)
    write_json(plan.output / "update.json", {**verdict.to_json(), "corrections": learnt})
    _report(plan, [before[id] for id in measured], [after[id] for id in measured])
    console.print(gate.sheet(verdict).rich())
    console.print(
        f"corrections right: {learnt['before']} before, {learnt['after']} after, of {learnt['rows']}; golden set: "
        f"{len(verdict.golden.broken)} of {verdict.golden.rows} broken, {len(verdict.golden.mended)} mended, "
        f"{len(verdict.golden.wrong_before_and_after)} wrong before and after",
        highlight=False,
    )
    verdict.raise_if_refused()
    journal = plan.output / "new.jsonl"
    asked = {kind: measure(prepared.calibration, str(new), journal, how) for kind, how in kinds(facts).items()}
    fitted = calibration(facts.revision, **asked)
    return revision.write_revision(
        new,
        plan.output / "revision",
        card=_card(plan, prepared, new, list(summaries.values()), verdict, fitted, learnt),
        lineage=_lineage(plan, prepared, facts, verdict, learnt),
        calibration=fitted,
        results={_stem(path): summary for path, summary in summaries.items()},
    )


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def _summary(
    plan: Plan, path: Path, rows: Sequence[Row], said: Mapping[str, Outcome], facts: ModelFacts
) -> dict[str, Any]:
    figures = summarise([said[row.id] for row in rows], model=facts.name, revision=facts.revision)
    return {"data": path.name, "limit": plan.limit, **figures}


def _report(plan: Plan, before: Sequence[Outcome], after: Sequence[Outcome]) -> None:
    named = {f"{name} {group[0].revision}": list(group) for name, group in (("new", after), ("current", before))}
    ours, theirs = named
    summaries = {
        name: {**summarise(group, model=name, revision=group[0].revision), "benchmarks": None}
        for name, group in named.items()
    }
    compared = {"ours": ours, "theirs": theirs, **compare(after, before)}
    facts = [("Data", ", ".join(path.name for path in plan.evaluation)), ("Made", plan.made)]
    write_report(
        plan.output / "report.html",
        render(summaries, named, facts=facts, mode="strict", compared=compared, skipped=""),
    )


def _lineage(
    plan: Plan, prepared: Prepared, facts: ModelFacts, verdict: gate.Judgement, learnt: Mapping[str, int]
) -> dict[str, Any]:
    base = resolve(plan.model).facts
    sources = Counter(row.source for row in prepared.lessons)
    return revision.lineage(
        facts=facts,
        base={"name": base.name, "revision": base.revision},
        data=[revision.data_file(role, path) for role, path in plan.files()],
        recipe={"sft": _nameless(asdict(plan.sft)), "rl": _nameless(asdict(plan.rl)) if plan.rl else None},
        made=plan.made,
        lessons={
            "file": revision.data_file("lessons", plan.output / LESSONS),
            "sources": dict(sorted(sources.items())),
            "replay_share": plan.replay_share,
            "rationales": dict(sorted(prepared.origins.items())),
            "reviewers": prepared.reviewers,
        },
        gate=verdict.to_json(),
        corrections=dict(learnt),
    )


def _nameless(recipe: dict[str, Any]) -> dict[str, Any]:
    """Without the places of files on this machine."""
    return {name: value for name, value in recipe.items() if name not in ("model", "architecture")}


def _card(
    plan: Plan,
    prepared: Prepared,
    new: Path,
    summaries: Sequence[Mapping[str, Any]],
    verdict: gate.Judgement,
    calibration: Mapping[str, Any],
    learnt: Mapping[str, int],
) -> str:
    weights = resolve(plan.model)
    sources = [
        SourceFacts(
            one.source, one.rows, one.harmful, one.licences or (("the operator's own",) * (one.source == SOURCE))
        )
        for one in count_sources(prepared.lessons)
    ]
    steps = "reasoning SFT" + (" and online RL" if plan.rl else "")
    text = (
        f"`guard-train update` ({steps}) from revision `{weights.facts.revision}` of {weights.facts.name}, whose card "
        f"says what it was made of. Digests of all files, versions and the commit: `{manifest.LINEAGE}`."
    )
    note = (
        f"Corrections of operators and a replay share of older training rows. Of {learnt['rows']} corrections, "
        f"{learnt['before']} were right before and {learnt['after']} are after (they were trained on)."
    )
    return write_card(
        new,
        licence=plan.licence or licence_of(weights.folder) or "other",
        sources=sources,
        recipe=Recipe(text, _nameless(asdict(plan.sft))),
        summaries=summaries,
        base=weights.facts.name,
        data_note=note,
        changes=[gate.sheet(verdict)],
        calibration=calibration,
        limits=plan.limits,
    )
