"""Reader of the corpora that GuardReasoner's authors released, rationales included.

``yueliu1999/GuardReasoner-VLTrain`` (splits ``image``, ``text``, ``text_image``): ``messages`` of system, user and
assistant, and ``images``. ``yueliu1999/GuardReasonerTrain``: ``instruction, input, output`` of the older model with
three tasks. Both hold one transcript and one answer of the teacher:

    Human user:\\n[<image>\\n]{prompt}\\n\\nAI assistant:\\n{response or None}\\n[\\n]
    <think>\\n{rationale}\\n</think>\\n<result>\\nAnswers: \\nRequest: ..\\n[Completion: ..\\n]Response: ..\\n</result>

Read loosely, as this is data and not a guard's verdict: tags may be missing, ``Answers:`` may carry a space or stars,
a label may be ``None`` and ``harmless`` stands for unharmful. The labels are those of the last ``Answers:``. Refuses:
another order of roles, two images or more, no ``Answers:``, a transcript of another form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from guard_middleware.guard.parse import END_THINK, RESULT, TAGS, THINK
from guard_middleware.guard.prompt import ASSISTANT, HUMAN, NO_ANSWER
from guard_middleware.types import Label
from guard_training.corpus.sources.fields import Fields, Picture, Unusable, picture, text

_IMAGE = "<image>"
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_ANSWERS = re.compile(
    r"\**Answers:\**[ \t]*\n\s*Request:\s*(harmful|unharmful|harmless|none)\s*\n"
    r"(?:\s*Completion:[^\n]*\n)?\s*Response:\s*(harmful|unharmful|harmless|none)",
    re.IGNORECASE,
)
_RULE = re.compile(r"\n\s*-{3,}\s*$")
_LABELS: Mapping[str, Label | None] = {
    "harmful": "harmful",
    "unharmful": "unharmful",
    "harmless": "unharmful",
    "none": None,
}


def guardreasoner(record: Mapping[str, Any]) -> Fields:
    """``messages`` (system, user, assistant) and ``images``, or ``instruction, input, output``: a transcript and the
    teacher's answer, whose last ``Answers:`` gives the labels (None is unlabelled) and what precedes it the rationale.

    A label whose side is not there (an answer of ``None``) is dropped.
    """
    if "messages" in record or "conversations" in record:
        user, output = _sharegpt(record.get("messages") or record.get("conversations"))
    else:
        user, output = text(record, "input"), text(record, "output")
    image = _image(record, _IMAGE in user)
    prompt, response = _transcript(user, pictured=image is not None)
    rationale, request, answered = _answer(output)
    return Fields(prompt, request, response, answered if response else None, image=image, rationale=rationale)


def _sharegpt(messages: Any) -> tuple[str, str]:
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise Unusable("messages is not a list of messages")
    turns = [
        (_ROLES.get(str(m.get("role") or m.get("from")), "?"), m.get("content") or m.get("value")) for m in messages
    ]
    if [role for role, _ in turns if role != "system"] != ["user", "assistant"]:
        raise Unusable("messages are not system, user and assistant")
    if not all(isinstance(content, str) for _, content in turns):
        raise Unusable("a message has no text")
    return turns[-2][1], turns[-1][1]


def _image(record: Mapping[str, Any], placed: bool) -> Picture | None:
    given = record.get("images")
    found = [given] if isinstance(given, (str, bytes, Mapping)) else list(given if given is not None else [])
    if len(found) > 1:
        raise Unusable(f"{len(found)} images, one is the most")
    if not found:
        return None
    if not placed:
        raise Unusable(f"an image, and no {_IMAGE} in the transcript")
    return picture({"images": found[0]}, "images")


def _transcript(user: str, *, pictured: bool) -> tuple[str, str | None]:
    _, human, rest = user.partition(HUMAN)
    rest = rest.rstrip("\n")
    # Prompts quote transcripts: an empty answer is at the very end, any other begins at the first header.
    empty = ASSISTANT + NO_ANSWER
    if not human or ASSISTANT not in rest:
        raise Unusable("the user's message is no transcript (Human user: .. AI assistant: ..)")
    prompt, response = (rest[: -len(empty)], None) if rest.endswith(empty) else _split(rest)
    if pictured:
        prompt = prompt.removeprefix(_IMAGE).removeprefix("\n")
    return prompt, response


def _split(rest: str) -> tuple[str, str | None]:
    prompt, _, response = rest.partition(ASSISTANT)
    return prompt, response or None


def _answer(output: str) -> tuple[str | None, Label | None, Label | None]:
    found = list(_ANSWERS.finditer(output))
    if not found:
        raise Unusable("the assistant's message has no Answers: with Request: and Response:")
    last = found[-1]
    before = output[: last.start()]
    if THINK in before and END_THINK in before:
        before = before[before.index(THINK) + len(THINK) : before.rindex(END_THINK)]
    rationale = _RULE.sub("", before.rstrip().removesuffix(RESULT).rstrip()).strip()
    if any(tag in rationale for tag in TAGS):
        raise Unusable("the rationale holds a tag of the output format")
    request, response = (_LABELS[word.lower()] for word in last.groups())
    return rationale or None, request, response
