"""The verdict alone, of a guard that has no form: an empty reasoning, then the likelier label of each side.

The published weights were not trained to judge without reasoning, yet know what stands after it. The fixed words come
from the format of the output, and only the first token of a label is the model's choice: the score is its probability
of *harmful* against *unharmful* there. A model for which another token is likelier than both has no label to give, and
what it would rather write is left to the parser, which refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor

from guard_middleware.guard.parse import END_RESULT, END_THINK, RESULT, THINK


class Words:
    """The ids of the fixed words, for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

        self.start = ids(f"{THINK}\n\n{END_THINK}\n{RESULT}\nAnswers:\nRequest:")
        self.response, self.none, self.end = ids("\nResponse:"), ids("\nResponse: None"), ids(f"\n{END_RESULT}")
        self.labels = ids(" harmful"), ids(" unharmful")


@dataclass(slots=True)
class Brief:
    """One verdict in the making; used like ``form.Filling``."""

    words: Words
    answered: bool
    scores: dict[str, float] = field(default_factory=dict)
    complete: bool = False
    _fixed: list[int] | None = None

    def choose(self, logits: Tensor) -> int:
        """The next id, which begins a label or ends the output."""
        chosen = int(logits.argmax())
        self.take(chosen, logits)
        return chosen

    def take(self, id: int, logits: Tensor | Mapping[int, float]) -> None:
        """Fills in an id that was chosen, with the scores by which."""
        harmful, unharmful = self.words.labels
        if id not in (harmful[0], unharmful[0]):
            self.complete = True
            return
        margin = torch.tensor(float(logits[harmful[0]]) - float(logits[unharmful[0]]))
        self.scores["response" if self.scores else "request"] = float(torch.sigmoid(margin))
        rest = list(harmful[1:] if id == harmful[0] else unharmful[1:])
        if self.answered and len(self.scores) == 1:
            self._fixed = [*rest, *self.words.response]
        else:
            self._fixed = [*rest, *(() if self.answered else self.words.none), *self.words.end]
            self.complete = True

    def run_on(self) -> list[int]:
        """The ids that stand before the next choice, once each."""
        fixed, self._fixed = list(self.words.start) if self._fixed is None else self._fixed, []
        return fixed
