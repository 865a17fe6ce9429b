"""Llama Guard 4 (12B): text and images, one label and S1 to S14 for the last turn.

The chat template that ships with the weights writes the prompt (categories, conversation, instructions) around the
turns, so a question is the turns alone. The model judges *only the last* one: an answer costs a second call.

    safe                            unsafe
                                    S1,S9

Refuses: another word, another case, categories after *safe*, anything else. It takes no policy of an operator: the
template's categories are fixed (a server may be given another template; that is another guard).

Source: https://www.llama.com/docs/model-cards-and-prompt-formats/llama-guard-4/ and
https://github.com/meta-llama/PurpleLlama/blob/main/Llama-Guard4/12B/MODEL_CARD.md
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

_HARMLESS = Neutraliser(tags=[r"(?:BEGIN|END) [A-Z ]{1,40}"], headings=["User", "Agent"])
_OUTPUT = re.compile(r"\s*(safe|unsafe)(?:[ \t]*\n\s*(S[0-9]{1,2}(?:[ \t]*,[ \t]*S[0-9]{1,2})*))?\s*", re.ASCII)
_CATEGORIES = {
    "S1": "violent_crimes",
    "S2": "nonviolent_crimes",
    "S3": "sex_crimes",
    "S4": "child_exploitation",
    "S5": "defamation",
    "S6": "specialized_advice",
    "S7": "privacy",
    "S8": "intellectual_property",
    "S9": "weapons",
    "S10": "hate",
    "S11": "self_harm",
    "S12": "sexual_content",
    "S13": "elections",
    "S14": "code_abuse",
}


@dataclass(frozen=True, slots=True)
class LlamaGuard4:
    """See the module."""

    name: ClassVar[str] = "llama-guard-4"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"text", "image"})
    thinks: ClassVar[bool] = False
    words: ClassVar[Words] = Words(harmful=("unsafe",), unharmful=("safe",))

    categories: ClassVar[Mapping[str, str]] = _CATEGORIES

    def prompt(
        self, conversation: Conversation, drawn: Sequence[str] = (), *, think: bool = True
    ) -> tuple[Question, ...]:
        return one_by_one(*slots(conversation, _HARMLESS, drawn), Question((), (), max_tokens=64))

    def parse(self, output: Output, question: Question) -> Parsed:
        found = _OUTPUT.fullmatch(output.text)
        if found is None:
            raise unparseable("the output is not safe or unsafe with its categories")
        word, codes = found.groups()
        (target,) = question.targets
        if word == "safe":
            if codes:
                raise unparseable("safe, and yet with categories")
            return Parsed((Finding(target, "unharmful", found.start(1)),))
        categories = named(re.findall("S[0-9]+", codes or ""), _CATEGORIES)
        return Parsed((Finding(target, "harmful", found.start(1)),), categories)
