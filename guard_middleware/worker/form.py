"""A form that a small guard fills in: its reasoning and verdict as a sequence of slots, by constrained decoding.

A guard of a few million parameters forgets its format, quotes words that stand nowhere in the input, and contradicts
itself between two steps. A ``form`` in its ``guard.json`` leaves it the choices that are judgements and takes away the
others. ``{"answered": [slot, ...], "unanswered": [slot, ...]}``, and for verdicts without reasoning, where the guard
was trained to give them, ``label_answered`` and ``label_unanswered``. Each slot is one of

    {"one_of": [TOKEN, ...]}                                              the likeliest of these
    {"decide": NAME, "harmful": [TOKEN, ...], "unharmful": [TOKEN, ...]}  the guard's decision
    {"repeat": NAME, "harmful": [TOKEN, ...], "unharmful": [TOKEN, ...]}  a choice on the side decided before
    {"quote": LENGTH}                                                     a span of what is judged

where NAME is ``request`` or ``response``, and a TOKEN is the whole text of one token. The score of a decision is the
guard's probability of the harmful side where it decides. A quote repeats a span of the judged tokens, begins and ends
at a word, and closes at the first word's end after LENGTH tokens (inside a word only where that is very long); the
slot after it closes it.

Refuses (``ConfigError``): a text that is no token, a slot of another shape, a repetition of what was not decided, a
form that decides nothing about the request (or, answered, the response), two quotes in a row or one at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from guard_middleware.errors import ConfigError

#: tokens past a quote's length after which it closes inside a word: some texts have no words
_LONG_WORD = 8
_PARTS, _LABEL_PARTS = {"answered", "unanswered"}, {"label_answered", "label_unanswered"}


@dataclass(frozen=True, slots=True)
class Slot:
    """``sides`` for a decision or its repetition, ``choices`` for ``one_of``, ``quote`` > 0 for a quote."""

    choices: tuple[int, ...] = ()
    sides: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    name: str = ""
    decides: bool = False
    quote: int = 0

    @property
    def chooses(self) -> bool:
        return self.quote > 0 or self.decides or max(len(self.choices), *map(len, self.sides or ((),))) > 1


class Form:
    """The form of one guard, shared by its rows."""

    def __init__(self, stated: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        self.texts = [tokenizer.decode([id], skip_special_tokens=False) for id in range(tokenizer.get_vocab_size())]
        self._ids = {text: id for id, text in enumerate(self.texts)}
        if set(stated) not in (_PARTS, _PARTS | _LABEL_PARTS):
            raise _refused("a form has the parts answered and unanswered, and both or none of their label_ forms")
        self._slots = {
            part: self._read(slots, ("request",) if part.endswith("unanswered") else ("request", "response"))
            for part, slots in stated.items()
        }

    @property
    def judges_without_reasoning(self) -> bool:
        return set(self._slots) >= _LABEL_PARTS

    def start(self, judged: Sequence[int], *, answered: bool, think: bool = True) -> Filling:
        """A blank form for one prompt; ``judged`` are the ids of its user turn."""
        part = f"{'' if think else 'label_'}{'answered' if answered else 'unanswered'}"
        return Filling(self._slots[part], tuple(judged), self.texts)

    def _read(self, stated: Any, due: Sequence[str]) -> tuple[Slot, ...]:
        slots = tuple(self._slot(item) for item in stated) if isinstance(stated, list) else ()
        decided: set[str] = set()
        for slot, following in zip(slots, (*slots[1:], None), strict=True):
            if slot.quote and (following is None or following.quote):
                raise _refused("a quote needs a slot that closes it")
            if slot.sides and not slot.decides and slot.name not in decided:
                raise _refused(f"{slot.name!r} is repeated before it is decided")
            if slot.decides:
                decided.add(slot.name)
        if decided != set(due):
            raise _refused(f"must decide {' and '.join(due)}, and decides {sorted(decided)}")
        return slots

    def _slot(self, item: Any) -> Slot:
        match item:
            case {"one_of": list(texts), **rest} if not rest:
                return Slot(choices=self._tokens(texts))
            case {"quote": int(words), **rest} if not rest and words > 0:
                return Slot(quote=words)
            case {"decide": str(name), "harmful": list(a), "unharmful": list(b), **rest} if not rest:
                return Slot(sides=(self._tokens(a), self._tokens(b)), name=name, decides=True)
            case {"repeat": str(name), "harmful": list(a), "unharmful": list(b), **rest} if not rest:
                return Slot(sides=(self._tokens(a), self._tokens(b)), name=name)
            case _:
                raise _refused(f"no slot: {item!r}")

    def _tokens(self, texts: Sequence[Any]) -> tuple[int, ...]:
        unknown = [text for text in texts if text not in self._ids]
        if unknown or not texts:
            raise _refused(f"no token reads {unknown[0]!r}" if unknown else "a slot without a token")
        return tuple(self._ids[text] for text in texts)


@dataclass(slots=True)
class Filling:
    """One form in the making; ``scores`` are P(harmful) of the decisions made so far."""

    slots: tuple[Slot, ...]
    judged: tuple[int, ...]
    texts: Sequence[str]
    scores: dict[str, float] = field(default_factory=dict)
    _index: int = 0
    _span: list[int] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return self._index == len(self.slots)

    def choose(self, logits: Tensor) -> int:
        """The next id; ``logits`` is the row of scores, by id. Not to be called when ``complete``."""
        slot = self.slots[self._index]
        ids = self.open()
        if slot.decides and slot.sides:  # several tokens of a side outweigh the likeliest of the other
            ids = slot.sides[0 if _decision(slot.sides, logits) >= 0.5 else 1]
        chosen = _likeliest(logits, ids)
        self.take(chosen, logits)
        return chosen

    def take(self, id: int, logits: Tensor | Mapping[int, float] | None = None) -> None:
        """Fills in one more id that was chosen, with the scores by which; without them a decision scores 0 or 1."""
        slot = self.slots[self._index]
        if slot.quote:
            if id not in self.open_to(self.slots[self._index + 1]):
                self._span.append(id)
                return
            self._span.clear()
            self._index += 1
            slot = self.slots[self._index]
        if slot.decides and slot.sides:
            self.scores[slot.name] = float(id in slot.sides[0]) if logits is None else _decision(slot.sides, logits)
        self._index += 1

    def run_on(self) -> list[int]:
        """Fills in what leaves no choice, up to the next one; returns those ids."""
        ids: list[int] = []
        while not self.complete and len(only := self.open()) == 1:
            self.take(only[0])
            ids.append(only[0])
        return ids

    def last_choices(self) -> frozenset[int]:
        """The ids of the last slot that leaves a choice, where no other slot has any of them; else none."""
        ids = [frozenset(slot.choices).union(*(slot.sides or ())) for slot in self.slots]
        last = max(n for n, slot in enumerate(self.slots) if slot.chooses)
        rest = frozenset().union(*ids[:last], *ids[last + 1 :])
        return ids[last] if ids[last].isdisjoint(rest) else frozenset()

    def copy(self) -> Filling:
        """The same form, filled in as far; what is chosen in one does not stand in the other."""
        return replace(self, scores=dict(self.scores), _span=list(self._span))

    def open_to(self, slot: Slot) -> tuple[int, ...]:
        """The ids that may stand in a slot that is no quote."""
        if slot.sides is None:
            return slot.choices
        if slot.decides:
            return slot.sides[0] + slot.sides[1]
        return slot.sides[0 if self.scores[slot.name] >= 0.5 else 1]

    def open(self) -> tuple[int, ...]:
        """The ids of which the next is one."""
        slot = self.slots[self._index]
        if not slot.quote:
            return self.open_to(slot)
        following, may_close = self._quotable()
        if not may_close and len(self._span) < slot.quote + _LONG_WORD:
            return tuple(following)
        closing = self.open_to(self.slots[self._index + 1])
        return closing if len(self._span) >= slot.quote else (*following, *closing)

    def _quotable(self) -> tuple[list[int], bool]:
        """(ids that continue the quote, whether it may close here)."""
        span, length = tuple(self._span), len(self._span)
        following: set[int] = set()
        ends_word = False
        for start in range(len(self.judged) - length + 1):
            if self.judged[start : start + length] != span:
                continue
            after = self.texts[self.judged[start + length]] if start + length < len(self.judged) else ""
            if after.strip() and (length or not after[0].isalnum() or start == 0):
                following.add(self.judged[start + length])
            ends_word = ends_word or not after[:1].isalnum()
        return sorted(following), (ends_word and length > 0) or not following


@dataclass(slots=True)
class Tentative:
    """A filling whose choices somebody else writes down, or does not: it stays one choice ahead of ``written``.

    ``written`` is their list, which grows by each choice that holds. A form that begins where some is written already
    is filled in from that; a decision in it then scores 0 or 1.
    """

    filling: Filling
    written: Sequence[int]
    _taken: int = 0
    _ahead: Filling | None = None

    def choose(self, logits: Tensor) -> int | None:
        """The next id, from what is written by now; None where the form is complete."""
        if self._ahead is not None and len(self.written) == self._taken + 1:
            self.filling, self._taken = self._ahead, self._taken + 1
        while self._taken < len(self.written):
            if not self.filling.complete:
                self.filling.take(self.written[self._taken])
            self._taken += 1
        self._ahead = self.filling.copy()
        return None if self._ahead.complete else self._ahead.choose(logits)


def _decision(sides: tuple[tuple[int, ...], tuple[int, ...]], logits: Tensor | Mapping[int, float]) -> float:
    harmful, unharmful = (
        torch.tensor([float(logits[id]) for id in side], dtype=torch.float32).logsumexp(0) for side in sides
    )
    return float(torch.sigmoid(harmful - unharmful))


def _likeliest(logits: Tensor, ids: Sequence[int]) -> int:
    return ids[int(logits[torch.tensor(ids, device=logits.device)].argmax())]


def _refused(why: str) -> ConfigError:
    return ConfigError(f"form: {why}", path="guard.json", remedy="see guard_middleware/worker/form.py")
