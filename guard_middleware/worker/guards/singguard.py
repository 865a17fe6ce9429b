"""SingGuard (2B, 4B, 8B): text and images, the label first, then reasoning, under rules that may be an operator's own.

The chat template of the weights writes the prompt around the turns; it takes the rules (``policy``) and how much to
think (``thinking_type``) as template values. It judges a request, or the answer where there is one.

    safe|unsafe
    (reasoning, in mode fast none)
    <answer>TITLE of the rule | Safe</answer>

The first line is the model's first impression and the answer its verdict: after reasoning the answer decides; without
reasoning the two must agree. The score is the first line's; where the answer overrules it the label is unsure.

An operator's policy is Markdown as the authors write it: ``### TITLE`` and what falls under it, and ``### Safe``.
Categories of such a policy keep the operator's titles.

Refuses: another first line, text after the answer, a second tag, a title that is not in the policy (of an *unsafe*
verdict, that is ``other``). Mode ``label`` asks for ``fast``; measure before you trust it, users report that it misses
what ``fast-slow`` finds.

Source: https://github.com/inclusionAI/Sing-Guard (README) and https://arxiv.org/abs/2606.22873
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from guard_middleware.errors import ConfigError
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

_HARMLESS = Neutraliser(tags=["think", "answer", "reasoning", "tool_call", "tool_response", r"tts_\w{1,40}"])
_OUTPUT = re.compile(r"\s*(safe|unsafe)[ \t]*\n(.*)<answer>([^<>\n]{1,200})</answer>\s*", re.DOTALL)
_RULE = re.compile(r"^###[ \t]+(\S[^\n]*?)[ \t]*$", re.MULTILINE)
_SAFE = "Safe"
_CATEGORIES = {
    "A. Sexual Content Risk": "sexual_content",
    "B. Real-World Crimes & Public Safety": "crimes",
    "C. Unethical Behavior": "unethical",
    "D. Cybersecurity & Information Manipulation": "cybersecurity",
    "E. Agent Safety": "jailbreak",
    "F. Politically Sensitive Content": "political",
    "G. Animal Abuse": "animal_abuse",
}


@dataclass(frozen=True, slots=True)
class SingGuard:
    """See the module. Raises ``ConfigError`` for a policy without rules, or without ``### Safe``."""

    policy: str | None = None
    name: ClassVar[str] = "singguard"
    modalities: ClassVar[frozenset[Modality]] = frozenset({"text", "image"})
    thinks: ClassVar[bool] = True
    words: ClassVar[Words] = Words(harmful=("unsafe",), unharmful=("safe",))

    def __post_init__(self) -> None:
        if self.policy is None:
            return
        titles = _RULE.findall(self.policy)
        if titles.count(_SAFE) != 1 or len(titles) != len(set(titles)) or len(titles) < 2:
            remedy = "write each rule as `### TITLE`, no title twice, and end with `### Safe`"
            raise ConfigError("the policy text has no rules that SingGuard could name", remedy=remedy)

    @property
    def categories(self) -> Mapping[str, str]:
        if self.policy is None:
            return _CATEGORIES
        return {title: title for title in _RULE.findall(self.policy) if title != _SAFE}

    def prompt(
        self, conversation: Conversation, drawn: Sequence[str] = (), *, think: bool = True
    ) -> tuple[Question, ...]:
        template = [("thinking_type", "fast-slow" if think else "fast")]
        if self.policy is not None:
            template.append(("policy", self.policy))
        pattern = Question((), (), max_tokens=1024 if think else 64, template=tuple(template))
        return one_by_one(*slots(conversation, _HARMLESS, drawn), pattern)

    def parse(self, output: Output, question: Question) -> Parsed:
        found = _OUTPUT.fullmatch(output.text)
        if found is None or output.text.count("<answer>") != 1 or output.text.count("</answer>") != 1:
            raise unparseable("the output is not a first line and one answer")
        first, between, title = found[1], found[2].strip(), found[3].strip()
        harmful = title != _SAFE
        if harmful and first == "safe" and title not in self.categories:
            raise unparseable("safe, and yet with a rule that is not in the policy")
        agrees = harmful == (first == "unsafe")
        if not agrees and not between:
            raise unparseable("the first line and the answer disagree, and nothing between them says why")
        (target,) = question.targets
        finding = Finding(target, "harmful" if harmful else "unharmful", found.start(1) if agrees else -1)
        categories = named([title], self.categories) if harmful else ()
        return Parsed((finding,), categories, between)
