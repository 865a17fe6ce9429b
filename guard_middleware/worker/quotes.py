"""Keeps what a guard quotes true: inside its quotation marks it may only repeat a span of what it judges.

A small guard writes fluent quotes that stand nowhere in the input, and such a quote is no evidence. With
``quote_marks`` in ``guard.json`` (two characters, such as ``«»``) decoding is constrained: the first token
of a quote is one of the judged tokens, each further one follows the span so far somewhere in them, and the quote
may close only where that span ends a word. Nothing outside the marks is touched, so no label is forced.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer


class Quotes:
    """The constraint for one tokenizer. ``marks`` are the opening and the closing character."""

    def __init__(self, tokenizer: Tokenizer, marks: str) -> None:
        opening, closing = marks[0], marks[1]
        self._texts = [tokenizer.decode([id], skip_special_tokens=False) for id in range(tokenizer.get_vocab_size())]
        self._opens = frozenset(id for id, text in enumerate(self._texts) if text.endswith(opening))
        self._closes = frozenset(id for id, text in enumerate(self._texts) if text.lstrip().startswith(closing))

    def allowed(self, judged: Sequence[int], written: Sequence[int]) -> list[int] | None:
        """Ids that may follow ``written``, or None where nothing is being quoted.

        ``judged`` is the part of the prompt that holds what is judged; images' placeholders in it are never quoted.
        """
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
