"""The deterministic teacher: short reasoning from a row's text, category and label, in the paper's output format.

Two or three steps. The first decides, and quotes the words that weigh most for its decision (by the lexicon of the
training texts) and says where they stand; the second names the topic; the third, where an answer is judged, decides
about the answer and quotes it. The verdict repeats the decisions, so it cannot contradict them. Every fixed phrase
is one token of nano's tokenizer (``PHRASES``), so that a verdict costs about twenty tokens.

``label`` is the other form: the verdict alone after an empty reasoning, for the worker's mode without thinking.

The same place takes a real teacher: ``external`` wraps a rationale written by somebody else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from guard_middleware.guard.parse import TAGS, completion
from guard_middleware.types import Label
from guard_training.corpus.rows import Skipped, read_lines, row_id
from guard_training.nano.lexicon import Lexicon


class Kind(StrEnum):
    """What a stretch of the completion is, which decides its weight in the loss."""

    TEMPLATE = "template"
    REQUEST = "request_decision"
    RESPONSE = "response_decision"
    PLACE = "place"
    QUOTE = "quote"
    TOPIC = "topic"
    LABEL = "label"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Stretch:
    text: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Judged:
    """What the teacher looks at. ``place`` says where ``words`` stand (see ``PLACES``).

    ``request`` None: the source does not label the request; the lexicon guesses, and the guess is not trained.
    """

    words: str
    place: str
    request: Label | None
    category: str | None = None
    answer: str | None = None
    response: Label | None = None


PLACES = ("the request", "the drawn text", "the system text", "the tool result", "an earlier turn")
_START, _IN, _OPEN = "<think>\nStep 1: ", {"harmful": "risky words in ", "unharmful": "ordinary words in "}, ": «"
_SECOND = {"harmful": " ».\nStep 2: it would do harm: ", "unharmful": " ».\nStep 2: it does no harm: "}
_THIRD = "\nStep 3: "
_ANSWER = {
    "harmful": "the answer is unsafe: «",
    "unharmful": "the answer is safe: «",
    "refusal": "the answer declines: «",
}
_END = {False: "\n</think>\n", True: " ».\n</think>\n"}
_BRIEF = "<think>\n</think>\n<result>\nAnswers:\nRequest:"
_REQUEST, _RESPONSE, _NONE, _CLOSE = "<result>\nAnswers:\nRequest:", "\nResponse:", "\nResponse: None", "\n</result>"

_TOPICS: dict[str, tuple[tuple[str, str], ...]] = {
    "harmful": (
        ("jailbreak", r"jailbreak|\bDAN\b|ignore (?:all|any|previous)|without (?:any )?restrictions|injection"),
        ("weapons and terror", r"terror|bomb|explosi|weapon|firearm|\bgun|iwp|chemical agent|nerve gas|assassin"),
        ("sexual content", r"\bsex|porn|prostitut|erotic|sxc|nude"),
        ("suicide or self-harm", r"suicid|self[- ]harm|ssh\b|anorexi|starv|eating disorder|overdos"),
        ("drugs", r"\bdrug|cocaine|meth\b|heroin|narcotic|alcohol|smoking|opioid|marijuana"),
        ("hacking", r"hack|malware|virus|phish|ransom|cyber|password|exploit|keylog|ddos|trojan|spyware"),
        ("fraud and theft", r"fraud|scam|steal|theft|launder|ponzi|counterfeit|forg|embezzl|ncr\b|robb|tax eva|econom"),
        ("hate and insults", r"\bhate|racis|discriminat|harass|bully|insult|offend|slur|toxic|bias|religio|gender"),
        ("violence", r"kill|murder|violen|kidnap|tortur|vcr\b|attack|abus|rape|stalk|poison|arson|physical harm"),
        ("privacy", r"privacy|prv\b|personal (?:data|information)|spy|surveil|dox|identity"),
        ("lies and propaganda", r"disinformation|misinformation|propaganda|fake|false|conspirac|defam|dfm\b|election"),
        ("harm to animals or nature", r"animal|pollut|dump|wildlife|landfill|horse|circus|cockfight|poach|climate"),
        ("advice that can hurt", r"advice|expertise|risk|medical|src\b|legal"),
        ("harmful acts", r""),
    ),
    "unharmful": (
        ("code", r"\bcode|python|function|def |script|sql|program|comput|borderline_cyber|software|html|algorithm"),
        ("money and banking", r"bank|card|account|payment|transfer|money|bill|credit|fee|loan|price|dollar|\$"),
        ("numbers and logic", r"how many|how much|calculat|equation|\bsum\b|number|probab|or false|percent|\bmath"),
        ("writing", r"write|essay|email|poem|story|rewrite|summari|translate|sentence|paragraph|letter"),
        ("health", r"health|doctor|medic|diet|sleep|exercise|vitamin|symptom"),
        ("travel and food", r"travel|flight|hotel|recipe|cook|food|restaurant|trip|meal|eat"),
        ("knowledge", r"what is|what are|who|explain|history|why|how do|how can|difference"),
        ("everyday talk", r""),
    ),
}  # fmt: skip
_PATTERNS = {label: [(name, re.compile(p, re.I)) for name, p in topics] for label, topics in _TOPICS.items()}
TOPICS = tuple(f"{name}." for topics in _TOPICS.values() for name, _ in topics)
_REFUSAL = re.compile(
    r"\b(?:sorry|cannot|can't|can not|unable to|won't|not able to|as an ai|apologi[sz]e|not appropriate|refuse)\b", re.I
)

#: Every fixed phrase; added to the tokenizer as one (non-special) token each. None is a stretch that the BPE could
#: learn too, or its id could come out of untrusted text.
PHRASES: tuple[str, ...] = (
    _START, *_IN.values(), *PLACES, _OPEN, *_SECOND.values(), *TOPICS, _THIRD, *_ANSWER.values(), *_END.values(),
    _REQUEST, _RESPONSE, _NONE, _CLOSE, _BRIEF,
)  # fmt: skip

#: What decides about the request, harmful first: phrases where it is reasoned, labels where it is not.
DECISIONS = (_IN["harmful"], _IN["unharmful"])
LABELS = (" harmful", " unharmful")
#: What decides about the answer in reasoning: unsafe, and either way to be safe.
ANSWERED = (_ANSWER["harmful"], _ANSWER["unharmful"], _ANSWER["refusal"])


def topic(label: Label, category: str | None, words: str) -> str:
    """The topic of a text: from its category where that says something, else from its words."""
    for text in (category or "", words):
        for name, pattern in _PATTERNS[label]:
            if pattern.pattern and pattern.search(text):
                return name
    return _PATTERNS[label][-1][0]


def teach(judged: Judged, lexicon: Lexicon) -> list[Stretch]:
    """The completion for one case, in stretches; joined, it is exactly what ``guard.parse`` accepts."""
    known = judged.request is not None
    request: Label = judged.request or ("harmful" if lexicon.score(judged.words) > 0 else "unharmful")

    def about(text: str, kind: Kind) -> Stretch:
        return Stretch(text, kind if known else Kind.UNKNOWN)

    out = [
        about(_START, Kind.TEMPLATE),
        about(_IN[request], Kind.REQUEST),
        about(judged.place, Kind.PLACE),
        about(_OPEN, Kind.TEMPLATE),
        about(_quoted(lexicon.quote(judged.words, request)), Kind.QUOTE),
        about(_SECOND[request], Kind.TEMPLATE),
        about(f"{topic(request, judged.category, judged.words)}.", Kind.TOPIC),
    ]
    if judged.answer is not None and judged.response is not None:
        refuses = judged.response == "unharmful" and _REFUSAL.search(judged.answer[:200])
        quote = refuses.group().lower() if refuses else lexicon.quote(judged.answer[:600], judged.response)
        out += [
            Stretch(_THIRD, Kind.TEMPLATE),
            Stretch(_ANSWER["refusal" if refuses else judged.response], Kind.RESPONSE),
            Stretch(_quoted(quote), Kind.QUOTE),
        ]
    out += [
        Stretch(_END[judged.answer is not None], Kind.TEMPLATE),
        Stretch(_REQUEST, Kind.TEMPLATE),
        about(f" {request}", Kind.LABEL),
        *([Stretch(_NONE, Kind.TEMPLATE)] if judged.response is None else []),
        *([Stretch(_RESPONSE, Kind.TEMPLATE), Stretch(f" {judged.response}", Kind.LABEL)] if judged.response else []),
        Stretch(_CLOSE, Kind.TEMPLATE),
    ]
    return [stretch for stretch in out if stretch.text]


def label(judged: Judged) -> list[Stretch]:
    """The completion without reasoning; that there is none is the worker's choice and never trained."""
    request, response = judged.request or "unharmful", judged.response
    return [
        Stretch(_BRIEF, Kind.UNKNOWN),
        Stretch(f" {request}", Kind.REQUEST if judged.request else Kind.UNKNOWN),
        *([Stretch(_NONE, Kind.TEMPLATE)] if response is None else []),
        *([Stretch(_RESPONSE, Kind.TEMPLATE), Stretch(f" {response}", Kind.RESPONSE)] if response else []),
        Stretch(_CLOSE, Kind.TEMPLATE),
    ]


def decided(stretches: Sequence[Stretch]) -> list[Stretch]:
    """The beginning of a completion, to the end of its last decision that is known."""
    last = max(n for n, stretch in enumerate(stretches) if stretch.kind in (Kind.REQUEST, Kind.RESPONSE))
    return list(stretches[: last + 1])


def _quoted(quote: str) -> str:
    return f" {quote}" if quote else " -"


def form() -> dict[str, list[dict[str, object]]]:
    """The teacher's completions as a form that the worker lets the guard fill in (``worker.form``)."""

    def one_of(*texts: str) -> dict[str, object]:
        return {"one_of": list(texts)}

    def sides(kind: str, name: str, harmful: Sequence[str], unharmful: Sequence[str]) -> dict[str, object]:
        return {kind: name, "harmful": list(harmful), "unharmful": list(unharmful)}

    def topics(label: str) -> list[str]:
        return [f"{name}." for name, _ in _TOPICS[label]]

    def labels(name: str) -> dict[str, object]:
        return sides("repeat", name, [" harmful"], [" unharmful"])

    quote: dict[str, object] = {"quote": 6}
    head = [
        one_of(_START),
        sides("decide", "request", [_IN["harmful"]], [_IN["unharmful"]]),
        one_of(*PLACES),
        one_of(_OPEN),
        quote,
        sides("repeat", "request", [_SECOND["harmful"]], [_SECOND["unharmful"]]),
        sides("repeat", "request", topics("harmful"), topics("unharmful")),
    ]
    about_answer = [
        one_of(_THIRD),
        sides("decide", "response", [_ANSWER["harmful"]], [_ANSWER["unharmful"], _ANSWER["refusal"]]),
        quote,
        one_of(_END[True]),
    ]
    answered = [*head, *about_answer, one_of(_REQUEST), labels("request"), one_of(_RESPONSE), labels("response")]
    unanswered = [*head, one_of(_END[False]), one_of(_REQUEST), labels("request"), one_of(_NONE)]
    brief = [one_of(_BRIEF), sides("decide", "request", LABELS[:1], LABELS[1:])]
    response = [one_of(_RESPONSE), sides("decide", "response", LABELS[:1], LABELS[1:])]
    return {
        "answered": [*answered, one_of(_CLOSE)],
        "unanswered": [*unanswered, one_of(_CLOSE)],
        "label_answered": [*brief, *response, one_of(_CLOSE)],
        "label_unanswered": [*brief, one_of(_NONE), one_of(_CLOSE)],
    }


def external(reasoning: str, judged: Judged) -> list[Stretch]:
    """The completion with a real teacher's rationale."""
    if judged.request is None:
        raise ValueError("a rationale needs a row whose request is labelled")
    whole = completion(reasoning, judged.request, judged.response)
    thought, _, verdict = whole.partition("</think>")
    return [Stretch(thought, Kind.QUOTE), Stretch("</think>" + verdict, Kind.LABEL)]


def read_rationales(path: Path, skipped: Skipped) -> dict[str, str]:
    """A real teacher's reasoning by row id: lines ``{"id", "reasoning"}``, or what ``guard-train synthesize`` writes.

    What cannot be used goes to ``skipped``: a line of anything else, a row's second one, a tag of the output format.
    """
    out: dict[str, str] = {}

    def keep(value: Mapping[str, Any], where: str) -> None:
        id, reasoning = row_id(value["id"]), value.get("reasoning") or value["rationale"]
        if id is None or not isinstance(reasoning, str):
            raise ValueError("id and reasoning are texts")
        if any(tag in reasoning for tag in TAGS):
            raise ValueError(f"{id}: the reasoning must not hold {', '.join(TAGS)}")
        if out.setdefault(id, reasoning) is not reasoning:
            raise ValueError(f"{id} a second time")

    for _ in read_lines(path, keep, skipped, "a rationale, {id, reasoning}"):
        pass
    return out


def joined(stretches: Sequence[Stretch]) -> str:
    return "".join(stretch.text for stretch in stretches)
