"""The reward function that TRL calls, and the completions log that it leaves: redacted, one file per rollout.

A line says which row was judged how: id, source, labels, what the guard said, reward, lengths, and a digest of the
completion. Its text is written only where asked for, because reasoning quotes what it judges; the prompt never is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from guard_training.corpus.rows import Row
from guard_training.tuning.alarms import Sampled
from guard_training.tuning.reward import Shape, Truth, score


def truth(row: Row) -> Truth:
    """What a row's completions are compared with: its own labels, those of the mix for a mixed row."""
    answered = bool(row.response and row.response_label)
    return Truth(row.request, row.response_label if answered else None, answered)


class SafetyReward:
    """``ends`` are the ids that end a completion; ``log`` is a folder, or None on processes that write none.

    After a call ``samples`` are the rollout's completions over all processes.
    """

    __name__ = "safety"

    def __init__(self, rows: Sequence[Row], shape: Shape, ends: Sequence[int], log: Path | None, *, raw: bool) -> None:
        self._rows, self._shape, self._ends, self._log, self._raw = rows, shape, frozenset(ends), log, raw
        self.samples: list[Sampled] = []

    def __call__(
        self, prompts: Any, completions: Any, completion_ids: list[list[int]], trainer_state: Any, **_: Any
    ) -> list[float]:
        """One reward per completion of this process; never None, for which TRL would print the texts."""
        samples, records = [], []
        for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True):
            row, text = self._rows[int(prompt[-1]["content"])], completion[0]["content"]
            value, right, parsed = score(text, len(ids), truth(row), self._shape)
            cut = not ids or ids[-1] not in self._ends
            samples.append(
                Sampled(row.id, row.image is not None, parsed.reasoning if parsed else None, len(ids), cut, right)
            )
            records.append(
                {
                    "id": row.id,
                    "source": row.source,
                    "image": row.image is not None,
                    "labels": [row.request, row.response_label],
                    "said": [parsed.request, parsed.response] if parsed else None,
                    "reward": value,
                    "tokens": len(ids),
                    "characters": len(text),
                    "truncated": cut,
                    "digest": hashlib.sha256(text.encode()).hexdigest()[:16],
                    **({"text": text} if self._raw else {}),
                }
            )
        rewards = [record["reward"] for record in records]
        self.samples, records = gather_object(samples), gather_object(records)
        if self._log is not None:
            self._log.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (self._log / f"step-{trainer_state.global_step:06d}.jsonl").write_text(lines, encoding="utf-8")
        return rewards
