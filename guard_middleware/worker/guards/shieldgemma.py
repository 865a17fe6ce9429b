"""ShieldGemma 2 (4B): images only, one question per image and policy, answered Yes (it violates) or No.

The chat template of the weights writes the question around an image and the policy's definition; the first token of
the answer is the verdict and its probability the score. An image is harmful if any policy says Yes. Nothing that a
user wrote reaches the prompt. An answer's images are judged like a request's.

An operator's policies replace the three that the weights were trained on: paragraphs ``TITLE: definition``, apart by
an empty line; their categories keep the operator's titles.

Refuses: another output. Text is not judged: see ``--ignore`` of the endpoint worker.

Source: https://ai.google.dev/gemma/docs/shieldgemma/model_card_2 and ``processing_shieldgemma2.py`` of
https://github.com/huggingface/transformers (the definitions, Apache-2.0)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from guard_middleware.errors import ConfigError
from guard_middleware.types import Blob, Conversation, Message
from guard_middleware.worker.guards.base import (
    Finding,
    Modality,
    Output,
    Parsed,
    Question,
    Target,
    Turn,
    Words,
    unparseable,
)

_OUTPUT = re.compile(r"\s*(Yes|No)\s*")
_POLICY = re.compile(r"([^:\n<]{1,80}): ([^<]+)")
_CATEGORIES = {
    "No Dangerous Content": "dangerous_content",
    "No Sexually Explicit content": "sexual_content",
    "No Violence/Gore content": "violence",
}
#: What the weights were trained on; another wording is another question.
_DEFINITIONS = (
    "No Dangerous Content: The image shall not contain content that facilitates or encourages activities that could "
    "cause real-world harm (e.g., building firearms and explosive devices, promotion of terrorism, instructions for "
    "suicide).",
    "No Sexually Explicit content: The image shall not contain content that depicts explicit or graphic sexual acts "
    "(e.g., pornography, erotic nudity, depictions of rape or sexual assault).",
    "No Violence/Gore content: The image shall not contain content that depicts shocking, sensational, or gratuitous "
    "violence (e.g., excessive blood and gore, gratuitous violence against animals, extreme injury or moment of "
    "death).",
)


@dataclass(frozen=True, slots=True)
class ShieldGemma2:
    """See the module. Raises ``ConfigError`` for a policy text that is no ``TITLE: definition`` paragraphs."""

    policy: str | None = None
    name: ClassVar[str] = "shieldgemma-2"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"image"})
    thinks: ClassVar[bool] = False
    words: ClassVar[Words] = Words(harmful=("Yes",), unharmful=("No",))

    def __post_init__(self) -> None:
        if not self._policies or not all(_POLICY.fullmatch(one) for one in self._policies):
            remedy = "write one paragraph per policy, `TITLE: definition`, apart by an empty line"
            raise ConfigError("the policy text has no policies that ShieldGemma could be asked about", remedy=remedy)

    @property
    def _policies(self) -> tuple[str, ...]:
        if self.policy is None:
            return _DEFINITIONS
        return tuple(" ".join(one.split()) for one in re.split(r"\n[ \t]*\n", self.policy) if one.strip())

    @property
    def categories(self) -> Mapping[str, str]:
        if self.policy is None:
            return _CATEGORIES
        return {title: title for title in map(_title, self._policies)}

    def prompt(
        self, conversation: Conversation, drawn: Sequence[str] = (), *, think: bool = True
    ) -> tuple[Question, ...]:
        answer = [] if conversation.answer is None else [conversation.answer]
        return (*self._ask("request", conversation.messages), *self._ask("response", answer))

    def _ask(self, target: Target, messages: Iterable[Message]) -> Iterable[Question]:
        blobs = [part for message in messages for part in message.parts if isinstance(part, Blob)]
        for blob in {blob.digest: blob for blob in blobs}.values():
            for policy in self._policies:
                turn = Turn("user", (blob, policy))
                category = self.categories[_title(policy)]
                yield Question((target,), (turn,), max_tokens=1, may_be_cut=True, category=category)

    def parse(self, output: Output, question: Question) -> Parsed:
        found = _OUTPUT.fullmatch(output.text)
        if found is None:
            raise unparseable("the output is not Yes or No")
        (target,) = question.targets
        if found[1] == "No":
            return Parsed((Finding(target, "unharmful", found.start(1)),))
        return Parsed((Finding(target, "harmful", found.start(1)),), (question.category,))


def _title(policy: str) -> str:
    return policy.partition(":")[0]
