"""What another guard's format is made of: questions in its own words, its output read strictly, text made harmless.

A ``GuardFormat`` turns a conversation into one ``Question`` per thing that its model judges at a time, and each
``Output`` into ``Parsed``. Everything here is a value; who sends the questions is the caller's affair.

The rules of every format:

- an output is exactly the published form or it is ``GuardError(unparseable)``; no verdict is searched for in text;
- a harmful verdict is never lost for its category: one that is missing or unknown is ``other``;
- a contradiction (*safe* with a category) is an error;
- what a user wrote cannot become a control token or a line of the prompt's frame (``Neutraliser``), because a server
  that is given text tokenises the user's words together with the template's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.prompt import ImageSlot, Segment, Untrusted, render
from guard_middleware.types import Blob, Conversation, Label

Modality = Literal["text", "image"]
Target = Literal["request", "response"]
Content = tuple[str | Blob, ...]

#: The neutral categories: the MLCommons hazards, and what other guards have beside them.
CATEGORIES = frozenset(
    """
    violent_crimes nonviolent_crimes sex_crimes child_exploitation defamation specialized_advice privacy
    intellectual_property weapons hate self_harm sexual_content elections code_abuse
    violence dangerous_content crimes unethical political jailbreak cybersecurity animal_abuse other
    """.split()
)
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Turn:
    """One message to the model: text that is already harmless, and images where they stand."""

    role: Literal["system", "user", "assistant"]
    content: Content


@dataclass(frozen=True, slots=True)
class Question:
    """One call of the model.

    ``template`` are the values that its chat template takes. ``may_be_cut`` says that ``max_tokens`` ends the output
    in time by design, so that reaching it is no error. ``category`` is what the question is about, where it is one.
    """

    targets: tuple[Target, ...]
    turns: tuple[Turn, ...]
    max_tokens: int
    template: tuple[tuple[str, str], ...] = ()
    may_be_cut: bool = False
    category: str = ""


@dataclass(frozen=True, slots=True)
class Output:
    """What a model wrote. ``reasoning`` is what its server took out of the text before it handed it over."""

    text: str
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """One label, and where in ``Output.text`` its word begins: the score is read there; at -1 nowhere, since the
    guard contradicts the word, and the label is unsure."""

    target: Target
    label: Label
    at: int


@dataclass(frozen=True, slots=True)
class Parsed:
    findings: tuple[Finding, ...]
    categories: tuple[str, ...] = ()
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Words:
    """The words by which a model says *harmful* and *unharmful*."""

    harmful: tuple[str, ...]
    unharmful: tuple[str, ...]


class GuardFormat(Protocol):
    """One guard's published prompt and output. Frozen; an operator's policy text is part of the value."""

    @property
    def name(self) -> str: ...

    @property
    def modalities(self) -> frozenset[Modality]:
        """What it reads; content of another kind is the caller's to refuse."""
        ...

    @property
    def thinks(self) -> bool:
        """Whether it can reason before it judges; a guard that cannot judges alike in every mode."""
        ...

    @property
    def words(self) -> Words: ...

    @property
    def categories(self) -> Mapping[str, str]:
        """The guard's own category -> one of ``CATEGORIES``, or an operator's own rule under its own name."""
        ...

    def prompt(
        self, conversation: Conversation, drawn: Sequence[str] = (), *, think: bool = True
    ) -> tuple[Question, ...]:
        """The calls that together judge the request, and the answer where there is one.

        ``drawn`` is what a reader found in each image. Raises ``GuardError`` (``unsupported``) for ``think=False``
        where the model cannot judge without thinking.
        """
        ...

    def parse(self, output: Output, question: Question) -> Parsed:
        """Total: the verdict on ``question.targets``, or ``GuardError(unparseable)``."""
        ...


class Neutraliser:
    """Takes the power from control strings in a text, visibly: a backslash goes into each.

    ``<|im_start|>`` becomes ``<\\|im_start|>``, the tag ``<think>`` becomes ``<\\think>``, and a line that begins with
    a heading of the frame (``USER:``) begins with ``\\USER:``. A string that holds backslashes there already gets one
    more, so that ``undo`` gives back exactly what came in. ``<|`` is split whatever follows: servers differ in the
    names they know.

    ``tags`` are patterns of what stands in angle brackets, ``headings`` words before a colon. Case is ignored.
    """

    def __init__(self, *, tags: Sequence[str] = (), headings: Sequence[str] = ()) -> None:
        after = "|".join([r"\|", *(rf"/?(?:{tag})\s*>" for tag in tags)])
        self._patterns = [re.compile(rf"<\\*(?={after})", re.IGNORECASE)]
        if headings:
            start = r"(?:^|(?<=[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]))"
            self._patterns.append(
                re.compile(rf"{start}[ \t]*\\*(?=(?:{'|'.join(headings)})[ \t]*:)", re.IGNORECASE),
            )

    def __call__(self, text: str) -> str:
        for pattern in self._patterns:
            text = pattern.sub(lambda found: found[0] + "\\", text)
        return text

    def undo(self, text: str) -> str:
        for pattern in self._patterns:
            text = pattern.sub(lambda found: found[0].removesuffix("\\"), text)
        return text


def slots(
    conversation: Conversation, harmless: Neutraliser, drawn: Sequence[str] = (), *, images: bool = True
) -> tuple[Content, Content | None]:
    """The request and the answer as ``guard.prompt`` writes them into its two slots, the users' words made harmless.

    Without ``images`` each is the word ``[image]``. Raises ``GuardError(media)`` as ``render`` does.
    """
    transcript = render(conversation, drawn)
    blobs = conversation.blobs()

    def shown(segment: Segment) -> str | Blob:
        match segment:
            case ImageSlot(index):
                return blobs[index] if images else "[image]"
            case Untrusted(text):
                return harmless(text)
            case _:
                return segment.text

    def content(segments: Sequence[Segment]) -> Content:
        return joined(map(shown, segments)) or ("[empty]",)

    return content(transcript.prompt), None if transcript.answer is None else content(transcript.answer)


def joined(parts: Iterable[str | Blob]) -> Content:
    """Neighbouring texts as one; those that show nothing are left out."""
    together: list[str | Blob] = []
    for part in parts:
        if isinstance(part, str) and together and isinstance(together[-1], str):
            together[-1] += part
        else:
            together.append(part)
    return tuple(part for part in together if isinstance(part, Blob) or part.strip())


def one_by_one(request: Content, answer: Content | None, question: Question) -> tuple[Question, ...]:
    """Two calls for models that judge the last turn only: the request alone, and the answer to it.

    ``question`` is the pattern of both; its turns stand before theirs.
    """
    user = Turn("user", request)
    asked = [replace(question, targets=("request",), turns=(*question.turns, user))]
    if answer is not None:
        turns = (*question.turns, user, Turn("assistant", answer))
        asked.append(replace(question, targets=("response",), turns=turns))
    return tuple(asked)


def unparseable(why: str) -> GuardError:
    return GuardError(GuardErrorKind.UNPARSEABLE, why)


def named(found: Sequence[str], categories: Mapping[str, str]) -> tuple[str, ...]:
    """The neutral names of a harmful verdict's categories, each once; ``other`` where there is none."""
    names = dict.fromkeys(categories.get(one, OTHER) for one in found)
    return tuple(names) or (OTHER,)
