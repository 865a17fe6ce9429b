"""Keeps a small guard's output true to its input, by constraining decoding as its ``guard.json`` says.

*Quotes.* A small guard writes fluent quotes that stand nowhere in the input, and such a quote is no evidence. Between
the two characters of ``quote_marks`` (such as ``«»``) it may only repeat a span of what it judges: the first token is
one of the judged tokens, each further one follows the span so far somewhere in them, and the quote may close only
where that span ends a word.

*Shape.* Whether an answer is there to judge is known before the guard thinks. ``answered_only`` and
``unanswered_only`` name tokens (by their text) that belong to one case alone; the other case never takes them. Of the
tokens in ``once`` an output holds one at most, so that a step is not taken twice.

Neither forces a label: both labels stay possible wherever a label stands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from guard_middleware.errors import ConfigError


class Guide:
    """The constraints of one guard. ``marks`` None leaves quotes alone. Raises ``ConfigError`` for an unknown token."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        marks: str | None = None,
        answered_only: Sequence[str] = (),
        unanswered_only: Sequence[str] = (),
        once: Sequence[str] = (),
    ) -> None:
        self._texts = [tokenizer.decode([id], skip_special_tokens=False) for id in range(tokenizer.get_vocab_size())]
        self._opens = self._closes = frozenset[int]()
        if marks is not None:
            self._opens = frozenset(id for id, text in enumerate(self._texts) if text.endswith(marks[0]))
            self._closes = frozenset(id for id, text in enumerate(self._texts) if text.lstrip().startswith(marks[1]))
        self._never = {True: self._named(unanswered_only), False: self._named(answered_only)}
        self._once = self._named(once)

    def choose(self, judged: Sequence[int], written: Sequence[int], answered: bool, logits: Tensor) -> int:
        """The likeliest id that may follow ``written``; ``logits`` is the row of scores, by id."""
        never = self._never[answered]
        if not self._once.isdisjoint(written):
            never = never | self._once
        quotable = self.quotable(judged, written)
        if quotable is not None:
            allowed = [id for id in quotable if id not in never]
            if allowed:
                return allowed[int(logits[torch.tensor(allowed, device=logits.device)].argmax())]
        best = int(logits.argmax())
        if best not in never:
            return best
        return next(int(id) for id in logits.argsort(descending=True) if int(id) not in never)

    def _named(self, texts: Sequence[str]) -> frozenset[int]:
        unknown = set(texts) - set(self._texts)
        if unknown:
            raise ConfigError(f"no token reads {sorted(unknown)[0]!r}", path="guard.json", remedy="name whole tokens")
        return frozenset(id for id, text in enumerate(self._texts) if text in texts)

    def quotable(self, judged: Sequence[int], written: Sequence[int]) -> list[int] | None:
        """Ids that may follow ``written`` in a quote, or None where nothing is being quoted.

        ``judged`` is the part of the prompt that holds what is judged; images' placeholders in it are never quoted.
        """
        if not self._opens:
            return None
        span: list[int] = []
        for id in reversed(written):
            if id in self._closes:
                return None
            if id in self._opens:
                break
            span.append(id)
        else:
            return None
        span.reverse()
        length = len(span)
        following: set[int] = set()
        ends_word = length == 0
        for start in range(len(judged) - length + 1):
            if list(judged[start : start + length]) != span:
                continue
            after = judged[start + length] if start + length < len(judged) else None
            if after is not None and self._texts[after].strip():
                following.add(after)
            ends_word = ends_word or after is None or not self._texts[after][:1].isalnum()
        return sorted(following | (self._closes if ends_word or not following else set()))
