"""Qwen3Guard-Gen (0.6B, 4B, 8B): text only, three severities, nine categories, and whether an answer refuses.

The chat template of the weights writes the prompt around the turns and judges *only the last* one, so an answer costs
a second call. It closes an empty think block itself: serve it without a reasoning parser.

    Safety: Safe|Unsafe|Controversial
    Categories: None | NAME, NAME
    Refusal: Yes|No                     (of an answer only)

*Controversial* is harmful here (the authors' strict mode); ``qwen3guard-gen-loose`` takes it for unharmful.
Refuses: a missing, repeated or other line, categories beside *Safe*, a refusal line about a request.

Source: https://github.com/QwenLM/Qwen3Guard and the chat template of
https://huggingface.co/Qwen/Qwen3Guard-Gen-8B/blob/main/tokenizer_config.json
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from guard_middleware.types import Conversation
from guard_middleware.worker.guards.base import (
    Finding,
    Modality,
    Neutraliser,
    Output,
    Parsed,
    Question,
    Words,
    named,
    one_by_one,
    slots,
    unparseable,
)

_TAGS = ["think", "tool_call", "tool_response", r"(?:BEGIN|END) [A-Z ]{1,40}"]
_HARMLESS = Neutraliser(tags=_TAGS, headings=["User", "Assistant"])
_OUTPUT = re.compile(
    r"\s*Safety:[ \t]*(Safe|Unsafe|Controversial)[ \t]*\n[ \t]*Categories:[ \t]*([^\n]{1,400})"
    r"(?:\n[ \t]*Refusal:[ \t]*(Yes|No))?\s*"
)
_CATEGORIES = {
    "Violent": "violence",
    "Non-violent Illegal Acts": "nonviolent_crimes",
    "Sexual Content or Sexual Acts": "sexual_content",
    "PII": "privacy",
    "Suicide & Self-Harm": "self_harm",
    "Unethical Acts": "unethical",
    "Politically Sensitive Topics": "political",
    "Copyright Violation": "intellectual_property",
    "Jailbreak": "jailbreak",
}


@dataclass(frozen=True, slots=True)
class Qwen3GuardGen:
    """See the module; ``loose`` takes *Controversial* for unharmful."""

    loose: bool = False
    modalities: ClassVar[frozenset[Modality]] = frozenset({"text"})
    thinks: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "qwen3guard-gen-loose" if self.loose else "qwen3guard-gen"

    @property
    def words(self) -> Words:
        if self.loose:
            return Words(harmful=("Unsafe",), unharmful=("Safe", "Controversial"))
        return Words(harmful=("Unsafe", "Controversial"), unharmful=("Safe",))

    categories: ClassVar[Mapping[str, str]] = _CATEGORIES

    def prompt(
        self, conversation: Conversation, drawn: Sequence[str] = (), *, think: bool = True
    ) -> tuple[Question, ...]:
        return one_by_one(*slots(conversation, _HARMLESS, drawn, images=False), Question((), (), max_tokens=128))

    def parse(self, output: Output, question: Question) -> Parsed:
        found = _OUTPUT.fullmatch(output.text)
        if found is None:
            raise unparseable("the output is not the lines Safety, Categories and Refusal")
        word, listed, refusal = found.groups()
        (target,) = question.targets
        if (refusal is None) == (target == "response"):
            raise unparseable("the line Refusal belongs to an answer's verdict, and to no other")
        names = [name.strip() for name in listed.split(",") if name.strip() != "None"]
        if word == "Safe" and names:
            raise unparseable("safe, and yet with categories")
        if word in self.words.unharmful:
            return Parsed((Finding(target, "unharmful", found.start(1)),))
        return Parsed((Finding(target, "harmful", found.start(1)),), named(names, _CATEGORIES))
