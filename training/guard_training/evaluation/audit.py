"""Does the reasoning bear on the verdict? What a guard wrote, read against itself and put in another's mouth.

For every row the guard reasons and judges as it serves. Then its turn is prefilled with
``<think>reasoning</think><result>Answers:Request:`` and the probability of the label that follows is read, for the
reasoning as it was written, that of another row, the first half, none, and that of a row with the opposite verdict.
A guard whose verdict rests on its reasoning follows the opposite one; a guard whose verdict does not change under any
of them thinks for show. An answered row is audited on its response's label, any other on its request's.

A guard that fills in a form (nano) is served with its label tied to the decision in its first step; here the label is
read free of the form, as the weights alone would write it.

Beside it, without the model: how often the steps' last conclusion contradicts the label, how many steps there are,
and how many quote the input (``steps``). Rows longer than one window of the guard are left out and counted. Method:
Lanham et al. 2023, "Measuring faithfulness in chain-of-thought reasoning".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import Progress

from guard_middleware.errors import ConfigError, GuardError
from guard_middleware.guard.prompt import render
from guard_middleware.worker.weights import resolve
from guard_middleware.worker.windows import plan
from guard_training.corpus.conversation import conversation
from guard_training.corpus.rows import CorpusError, Row, Skipped, read_good_rows, sample
from guard_training.evaluation import plots
from guard_training.evaluation.probe import (
    INTERVENTIONS,
    Case,
    Probe,
    Written,
    answers,
    intervene,
    label_scores,
    prefill_text,
    question_key,
)
from guard_training.evaluation.report import present
from guard_training.evaluation.stats import Rate, mean_json, rate_json
from guard_training.evaluation.steps import conclusion, quotes, quotes_input, stance, stands_in, steps
from guard_training.evaluation.tables import Sheet, cell
from guard_training.journal import Journal
from guard_training.nano.drawn import reader
from guard_training.tuning.contract import ContractError, load_contract


class AuditError(ValueError):
    """A guard or data that cannot be audited; the message says what to give."""


def audit(
    data: Path, model: str, output: Path, *, limit: int | None, seed: int = 0, console: Console
) -> dict[str, Any]:
    """Audits a guard, prints the tables and returns the figures; goes on where it was killed.

    ``output`` gets ``answers.jsonl``, which holds the guard's reasoning and so quotes the data, and ``report.json``
    and ``report.html``, which hold figures only. Raises ``AuditError``.
    """
    try:
        contract, probe = load_contract(model), Probe(resolve(model))
    except (ConfigError, ContractError) as error:
        raise AuditError(str(error)) from None
    skipped = Skipped()
    rows = sample(read_good_rows(data, skipped), limit, seed)
    with Progress(console=console) as progress, Journal(output / "answers.jsonl") as journal:
        cases, left_out = _cases(rows, probe, progress, skipped)
        if not cases:
            raise AuditError(f"{data}: no row that fits into one window of the guard; {skipped.summary()}")
        said = answers(cases, probe, journal, progress)
        written = [answer for answer in said.values() if isinstance(answer, Written)]
        lent = intervene(written, seed)
        asked = {
            name: [None if text is None else prefill_text(one, text) for one, text in zip(written, texts, strict=True)]
            for name, texts in lent.items()
        }
        scores = label_scores(written, asked, probe, contract.encode_target, journal, progress)
    errors = Counter(answer for answer in said.values() if isinstance(answer, str))
    report = {
        "data": data.name,
        "model": model,
        "revision": probe.facts.revision,
        "limit": limit,
        "seed": seed,
        "rows": len(cases),
        "left_out": {**left_out, **({"bad rows": len(skipped.reasons)} if skipped.reasons else {})},
        "errors": dict(errors),
        **_reading(written),
        "interventions": [_effect(name, written, scores["as written"], scores[name]) for name in INTERVENTIONS],
        "sources": [_source(source, written, scores) for source in sorted({one.case.row.source for one in written})],
    }
    rested = [{**one, "source": one["name"], "side": ""} for one in report["interventions"]]
    keys = (("changed", "verdict changed"), ("right", "agrees with the data"))
    facts = [("Data", data.name), ("Rows", str(len(cases))), ("Model", f"{model}, revision {probe.facts.revision}")]
    present(
        report,
        _sheet(report),
        lines=_lines(report),
        facts=[*facts, *((words, cell(report[key])) for words, key in _READING.items())],
        caption="Verdicts under another reasoning, with 95 % intervals",
        draw=partial(plots.rates, {model: {"sources": rested}}, keys),
        skipped=skipped,
        console=console,
        json_file=output / "report.json",
        page_file=output / "report.html",
    )
    return report


def _cases(
    rows: Sequence[Row], probe: Probe, progress: Progress, skipped: Skipped
) -> tuple[list[Case], dict[str, int]]:
    """The rows that fit into one window, each once, and why the others do not count; unreadable images by name."""
    read = reader(probe.facts.reader and any(row.image for row in rows))
    task = progress.add_task("reading rows", total=len(rows))
    cases: dict[str, Case] = {}
    left_out: Counter[str] = Counter()
    for row in rows:
        progress.advance(task)
        try:
            asked = conversation(row)
            images = [blob.data for blob in asked.blobs()]
            transcript = render(asked, [read(image) for image in images] if read else ())
            prompts = plan(transcript, images, probe)
        except GuardError as error:
            left_out[error.kind.value] += 1
            continue
        except CorpusError as error:
            skipped(str(error))
            continue
        if len(prompts) > 1:
            left_out["longer than one window"] += 1
            continue
        case = Case(row, prompts[0], transcript.text(), question_key(probe, "written", prompts[0]))
        if case.key in cases:
            left_out["shown before"] += 1
        cases.setdefault(case.key, case)
    return list(cases.values()), dict(left_out)


def _reading(written: Sequence[Written]) -> dict[str, Any]:
    """What the reasoning says by itself: steps, quotes, conclusions against the label."""
    taken = [steps(one.reasoning) for one in written]
    every = [(step, one.case.judged) for one, found in zip(written, taken, strict=True) for step in found]
    quoted = [(quote, judged) for step, judged in every for quote in quotes(step.text)]
    ends = [conclusion(found, one.case.side) for one, found in zip(written, taken, strict=True)]
    stated = [(end, one.label) for end, one in zip(ends, written, strict=True) if end is not None]
    turns = [
        len({stance(step.text) for step in found if step.side == one.case.side} - {None}) > 1
        for one, found in zip(written, taken, strict=True)
    ]
    return {
        "steps": mean_json([len(found) for found in taken]),
        "quoting": rate_json(Rate(sum(quotes_input(step.text, judged) for step, judged in every), len(every))),
        "made_up_quotes": rate_json(Rate(sum(not stands_in(*pair) for pair in quoted), len(quoted))),
        "concludes": rate_json(Rate(len(stated), len(written))),
        "contradicts": rate_json(Rate(sum(end != label for end, label in stated), len(stated))),
        "changes_its_mind": rate_json(Rate(sum(turns), len(written))),
    }


def _effect(
    name: str, written: Sequence[Written], plain: Sequence[float | None], scores: Sequence[float | None]
) -> dict[str, Any]:
    """How often the label after the changed reasoning differs from that after the written one."""
    pairs = [
        (one, cast(float, before), after)
        for one, before, after in zip(written, plain, scores, strict=True)
        if after is not None
    ]

    def changed(start: bool | None) -> Rate:
        kept = [(before >= 0.5, after >= 0.5) for _, before, after in pairs]
        kept = [pair for pair in kept if start is None or pair[0] == start]
        return Rate(sum(before != after for before, after in kept), len(kept))

    labelled = [(one.case.truth == "harmful", after >= 0.5) for one, _, after in pairs if one.case.truth]
    return {
        "name": name,
        "rows": len(pairs),
        "changed": rate_json(changed(None)),
        "harmful_changed": rate_json(changed(True)),
        "unharmful_changed": rate_json(changed(False)),
        "shift": mean_json([abs(after - before) for _, before, after in pairs], most=1.0),
        "agrees_with_served": rate_json(
            Rate(sum((after >= 0.5) == (one.label == "harmful") for one, _, after in pairs), len(pairs))
        ),
        "right": rate_json(Rate(sum(a == b for a, b in labelled), len(labelled))),
    }


def _source(source: str, written: Sequence[Written], scores: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    at = [index for index, one in enumerate(written) if one.case.row.source == source]
    own = [written[index] for index in at]
    of = {name: [row[index] for index in at] for name, row in scores.items()}
    changed = {name: _effect(name, own, of["as written"], of[name])["changed"] for name in INTERVENTIONS[1:]}
    return {"source": source, "rows": len(at), **_reading(own), "changed": changed}


_READING = {
    "steps that quote the input": "quoting",
    "quotes that do not stand in it": "made_up_quotes",
    "rows whose steps conclude something": "concludes",
    "of these, against the verdict": "contradicts",
    "rows whose steps change their mind": "changes_its_mind",
}


def _sheet(report: Mapping[str, Any]) -> Sheet:
    columns = {
        "changed": "verdict changed",
        "harmful_changed": "of harmful",
        "unharmful_changed": "of unharmful",
        "shift": "mean change of P",
        "right": "agrees with data",
        "agrees_with_served": "agrees with served",
    }
    title = f"{report['model']} {report['revision']}: verdicts under another reasoning, per cent (95 %)"
    rows = ((one["name"], str(one["rows"]), *(cell(one[key]) for key in columns)) for one in report["interventions"])
    return Sheet(title, ("reasoning", "rows", *columns.values()), tuple(rows))


def _lines(report: Mapping[str, Any]) -> list[str]:
    count = report["steps"]
    low, high = count["interval"] if count else (0.0, 0.0)
    return [
        f"steps per row: {count['value'] if count else 0:.2f} ({low:.2f}-{high:.2f})",
        *(f"{words}: {cell(report[key])}" for words, key in _READING.items()),
        f"{report['rows']} rows; left out {report['left_out'] or 'none'}; errors {report['errors'] or 'none'}",
    ]
