"""Puts reasoning into a guard's mouth and reads the label that it then writes.

The guard's turn is prefilled with ``<think>reasoning</think><result>Answers:Request:`` (for an answered row up to
``Response:``), and the probability of the next label is read: one forward pass per question, no form, no sampling.
Everything is kept in a journal under the digest of the guard and of what it was shown.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from rich.progress import Progress
from transformers import DynamicCache

from guard_middleware.errors import GuardError
from guard_middleware.guard.parse import completion
from guard_middleware.types import Label
from guard_middleware.worker.engine import GuardPrompt
from guard_middleware.worker.engine_transformers import TransformersEngine
from guard_middleware.worker.windows import judge
from guard_training.corpus.rows import Row
from guard_training.evaluation.outcomes import Side
from guard_training.journal import Journal

INTERVENTIONS = ("as written", "swapped", "half", "empty", "opposite")


@dataclass(frozen=True, slots=True)
class Case:
    """One row that fits into one window. ``judged`` is all that the guard is shown, as text."""

    row: Row
    prompt: GuardPrompt
    judged: str
    key: str

    @property
    def side(self) -> Side:
        return "response" if self.prompt.answered else "request"

    @property
    def truth(self) -> Label | None:
        return self.row.response_label if self.prompt.answered else self.row.request


@dataclass(frozen=True, slots=True)
class Written:
    """What the guard wrote about a case."""

    case: Case
    reasoning: str
    request: Label
    response: Label | None

    @property
    def label(self) -> Label:
        return self.request if self.response is None else self.response


class Probe(TransformersEngine):
    """The serving engine, asked for the next label after words that are put into the guard's mouth."""

    @torch.inference_mode()
    def label_scores(self, prompts: Sequence[GuardPrompt], prefills: Sequence[Sequence[int]]) -> list[float]:
        """P(harmful), 0..1, of the label that follows each prefill (ids); one forward pass."""
        rows, pixels = [], []
        for index, (prompt, prefill) in enumerate(zip(prompts, prefills, strict=True)):
            row, images = self._prepare(index, prompt)
            row.ids += prefill
            rows.append(row)
            pixels += images
        hidden, _, _ = self._prefill(rows, pixels, DynamicCache(config=self._model.config.get_text_config()))
        logits = self._model.lm_head(hidden[:, -1]).float()
        scores: list[float] = torch.sigmoid(logits[:, self._harmful] - logits[:, self._unharmful]).tolist()
        return scores


def prefill_text(written: Written, reasoning: str) -> str:
    """The guard's turn up to the label that is asked about."""
    whole = completion(reasoning, written.request, written.response)
    mark = "\nRequest:" if written.response is None else "\nResponse:"
    return whole[: whole.rindex(mark) + len(mark)]


def half(reasoning: str) -> str:
    """The first half of the words, with what stands between them."""
    words = re.findall(r"\S+\s*", reasoning)
    return "".join(words[: len(words) // 2]).rstrip()


def intervene(written: Sequence[Written], seed: int = 0) -> dict[str, list[str | None]]:
    """The reasoning that each row gets under each intervention; None where no other row can lend it one.

    Reasoning is only lent between rows that are both answered or both not, since it speaks of the answer.
    """
    rng = random.Random(seed)  # noqa: S311
    swapped: list[str | None] = [None] * len(written)
    opposite: list[str | None] = [None] * len(written)
    groups: dict[bool, list[int]] = defaultdict(list)
    for index, one in enumerate(written):
        groups[one.case.prompt.answered].append(index)
    for group in groups.values():
        rng.shuffle(group)
        for index, other in zip(group, [*group[1:], group[0]], strict=True):
            if index != other:
                swapped[index] = written[other].reasoning
        for index in group:
            others = [other for other in group if written[other].label != written[index].label]
            if others:
                opposite[index] = written[rng.choice(others)].reasoning
    return {
        "as written": [one.reasoning for one in written],
        "swapped": swapped,
        "half": [half(one.reasoning) for one in written],
        "empty": [""] * len(written),
        "opposite": opposite,
    }


def question_key(probe: Probe, kind: str, prompt: GuardPrompt, words: str = "") -> str:
    images = [hashlib.sha256(image).hexdigest() for image in prompt.images]
    stated = json.dumps([repr(probe.facts), kind, prompt.ids, images, words])
    return hashlib.sha256(stated.encode()).hexdigest()[:32]


def answers(cases: Sequence[Case], probe: Probe, journal: Journal, progress: Progress) -> dict[str, Written | str]:
    """What the guard wrote about each case, or the kind of its error, by the case's key."""
    due = [case for case in cases if case.key not in journal.done]
    task = progress.add_task("reasoning", total=len(due))
    for batch in _batches(due, probe):
        generations = probe.generate_batch([case.prompt for case in batch], lambda index: False)
        for case, generation in zip(batch, generations, strict=True):
            try:
                if isinstance(generation, GuardError):
                    raise generation
                said = judge(case.prompt, generation)
            except GuardError as error:
                journal.append({"id": case.key, "error": error.kind.value})
            else:
                journal.append(
                    {
                        "id": case.key,
                        "reasoning": said.reasoning,
                        "request": said.request,
                        "response": said.response,
                    }
                )
        progress.advance(task, len(batch))
    known = {line["id"]: line for line in journal}
    return {case.key: _written(case, known[case.key]) for case in cases}


def _written(case: Case, line: Mapping[str, Any]) -> Written | str:
    if "error" in line:
        return cast(str, line["error"])
    return Written(case, line["reasoning"], line["request"], line["response"])


def label_scores(
    written: Sequence[Written],
    asked: Mapping[str, Sequence[str | None]],
    probe: Probe,
    encode: Callable[[str], list[int]],
    journal: Journal,
    progress: Progress,
) -> dict[str, list[float | None]]:
    """P(harmful) of the label after each prefill, by intervention and row."""
    keys = {
        name: [
            None if text is None else question_key(probe, "score", one.case.prompt, text)
            for one, text in zip(written, texts, strict=True)
        ]
        for name, texts in asked.items()
    }
    due = {
        key: (one.case.prompt, text)
        for name, texts in asked.items()
        for one, text, key in zip(written, texts, keys[name], strict=True)
        if key is not None and text is not None and key not in journal.done
    }
    task = progress.add_task("reading labels", total=len(due))
    for batch in _batches(list(due.items()), probe):
        prompts = [prompt for _, (prompt, _) in batch]
        # encode_target ends the turn; the label is yet to come.
        prefills = [encode(text)[:-1] for _, (_, text) in batch]
        for (key, _), score in zip(batch, probe.label_scores(prompts, prefills), strict=True):
            journal.append({"id": key, "score": score})
        progress.advance(task, len(batch))
    known = {line["id"]: line["score"] for line in journal if "score" in line}
    return {name: [None if key is None else known[key] for key in row] for name, row in keys.items()}


def _batches(items: Sequence[Any], probe: Probe) -> list[Any]:
    return [items[start : start + probe.max_batch] for start in range(0, len(items), probe.max_batch)]
