"""Content longer than a guard judges well is judged in overlapping windows, and the worst verdict wins.

A guard with a small window (``facts.window_tokens``) reads the request in pieces, each with the literal ``None`` as
its answer, and the answer in pieces, each after a request that is cut in its middle where it is too long. Windows
overlap by ``facts.window_overlap`` tokens, so any stretch of text up to that length lies whole inside one of them.
Images are never cut; each is shown where it stands.

Nothing is cut away: content past ``max_input_tokens``, or past ``max_windows`` windows, is
``GuardError(too_long)``, for a guard that reads less than the upstream is a way round it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.parse import parse
from guard_middleware.guard.prompt import ASSISTANT, END, HUMAN, NO_ANSWER, Piece, Transcript, Trusted
from guard_middleware.types import Conversation, Label, Reasoning, Text, ToolCall, ToolCallResponse, Usage
from guard_middleware.worker.engine import Generation, GuardPrompt, Model

#: Text of more characters than this per token of the input limit is not even rendered.
_CHARACTERS_PER_TOKEN = 64
#: What stands in an answer's window for the middle of a long request.
_CUT = Trusted("\n[...]\n")
_LEAST_ROOM = 16

#: Tokens of pieces, images expanded.
_Size = Callable[[Sequence[Piece]], int]


@dataclass(frozen=True, slots=True)
class Judgement:
    """One output, read. Scores are the probability of *harmful*, 0..1; ``response`` is None without an answer."""

    request: Label
    response: Label | None
    request_score: float
    response_score: float | None
    reasoning: str
    usage: Usage


def texts(conversation: Conversation) -> Iterator[str]:
    """Every text that a conversation holds."""
    for definition in conversation.definitions:
        yield definition.text
    for message in [*conversation.messages, *([conversation.answer] if conversation.answer else [])]:
        yield message.name or ""
        for part in message.parts:
            match part:
                case Text(text) | Reasoning(text) | ToolCallResponse(_, text):
                    yield text
                case ToolCall(_, name, arguments):
                    yield from (name, arguments)


def check_characters(conversation: Conversation, model: Model) -> None:
    """Raises ``GuardError`` (``too_long``) for more text than is worth rendering and encoding at all."""
    characters = sum(map(len, texts(conversation)))
    if characters > _CHARACTERS_PER_TOKEN * model.facts.max_input_tokens:
        raise GuardError(GuardErrorKind.TOO_LONG, f"{characters} characters")


def plan(transcript: Transcript, images: Sequence[bytes], model: Model) -> list[GuardPrompt]:
    """The prompts that together show a model the whole transcript: one where it fits, else its windows.

    ``images`` are the bytes of all ``ImageSlot``s, by index. Raises ``GuardError`` (``too_long``, ``media``).
    What may be long beyond all bounds goes through ``check_characters`` first.
    """
    facts, encoder = model.facts, model.encoder
    tokens = [model.image_tokens(image) for image in images]
    whole = encoder.encode(transcript)
    total = len(whole.ids) + sum(tokens[index] - 1 for index in whole.images)
    if total > facts.max_input_tokens:
        raise GuardError(GuardErrorKind.TOO_LONG, f"{total} tokens where {facts.max_input_tokens} may be read")

    def guard_prompt(ids: Sequence[int], shown: Sequence[int], answered: bool) -> GuardPrompt:
        return GuardPrompt(tuple(ids), tuple(images[index] for index in shown), answered, facts.max_new_tokens)

    limit = facts.window_tokens or facts.max_input_tokens
    if total <= limit:
        return [guard_prompt(whole.ids, whole.images, whole.answered)]

    def size(pieces: Sequence[Piece]) -> int:
        return sum(len(p.ids) if p.image is None else tokens[p.image] + 2 for p in pieces)

    human, middle, end, none, cut = (
        encoder.pieces([part]) for part in (Trusted(HUMAN), Trusted(ASSISTANT), Trusted(END), Trusted(NO_ANSWER), _CUT)
    )
    frame = len(encoder.opening) + len(encoder.closing) + size([*human, *middle, *end])
    request = encoder.pieces(transcript.prompt)
    turns: list[tuple[list[Piece], bool]] = []
    context = request
    if transcript.answer is not None:
        context = _context(request, (limit - frame) // 3, cut, size)
    if transcript.answer is None or context is not request:
        for window in _slide(request, limit - frame - size(none), facts.window_overlap, size):
            turns.append(([*human, *window, *middle, *none, *end], False))
    if transcript.answer is not None:
        answer = encoder.pieces(transcript.answer)
        for window in _slide(answer, limit - frame - size(context), facts.window_overlap, size):
            turns.append(([*human, *context, *middle, *window, *end], True))
    if len(turns) > facts.max_windows:
        raise GuardError(GuardErrorKind.TOO_LONG, f"{len(turns)} windows where {facts.max_windows} may be read")
    prompts = []
    for turn, answered in turns:
        encoded = encoder.frame(turn, answered=answered)
        prompts.append(guard_prompt(encoded.ids, encoded.images, answered))
    return prompts


def _context(request: list[Piece], room: int, cut: list[Piece], size: _Size) -> list[Piece]:
    if size(request) <= room:
        return request
    half = max(0, (room - size(cut)) // 2)
    head, tail = _take(request, half, size), _take(request[::-1], half, size)[::-1]
    return [*head, *cut, *tail]


def _take(pieces: Sequence[Piece], room: int, size: _Size) -> list[Piece]:
    taken: list[Piece] = []
    for piece in pieces:
        room -= size([piece])
        if room < 0:
            break
        taken.append(piece)
    return taken


def _slide(pieces: list[Piece], room: int, overlap: int, size: _Size) -> list[list[Piece]]:
    """Windows of at most ``room`` tokens over pieces, each beginning up to ``overlap`` tokens before the last's end."""
    if room < _LEAST_ROOM:
        raise GuardError(GuardErrorKind.INTERNAL, "window_tokens leaves no room for content")
    windows: list[list[Piece]] = []
    start = 0
    while True:
        window = _take(pieces[start:], room, size)
        end = start + len(window)
        if not window and pieces:
            raise GuardError(GuardErrorKind.TOO_LONG, "an image that is larger than the guard's window")
        windows.append(window)
        if end == len(pieces):
            return windows
        back = len(_take(window[::-1], min(overlap, room // 2), size))
        start = end - back if back < len(window) else end


def judge(prompt: GuardPrompt, generation: Generation) -> Judgement:
    """What an output says of its prompt; raises ``GuardError`` (``truncated``, ``unparseable``).

    A label whose probability the engine did not see (it was written with other tokens) scores 0 or 1.
    """
    if generation.finish == "length":
        raise GuardError(GuardErrorKind.TRUNCATED, f"no verdict within {prompt.max_new_tokens} tokens")
    parsed = parse(generation.text, answered=prompt.answered)
    usage = Usage(generation.prompt_tokens, generation.completion_tokens, generation.reasoning_tokens)
    response_score = None if parsed.response is None else _score(generation.response_score, parsed.response)
    request_score = _score(generation.request_score, parsed.request)
    return Judgement(parsed.request, parsed.response, request_score, response_score, parsed.reasoning, usage)


def _score(score: float | None, label: Label) -> float:
    return float(label == "harmful") if score is None else score


def merge(outcomes: Sequence[Judgement | GuardError], *, answered: bool) -> Judgement:
    """One judgement of all windows: *harmful* if any says so, with the highest score and that window's reasoning.

    A window without a verdict makes the whole one without a verdict, except that *harmful* found elsewhere in what is
    asked about (the answer if there is one) stands, whatever a policy makes of errors. Raises ``GuardError``.
    """
    judged = [outcome for outcome in outcomes if isinstance(outcome, Judgement)]
    asked = [j for j in judged if (j.response is not None) == answered]
    found = [j for j in asked if (j.response if answered else j.request) == "harmful"]
    errors = [outcome for outcome in outcomes if isinstance(outcome, GuardError)]
    if errors and not found:
        raise errors[0]
    if not asked:
        raise GuardError(GuardErrorKind.INTERNAL, "no window judged what is asked about")
    responses = [j.response_score for j in judged if j.response_score is not None]
    worst = max(found or judged, key=_badness)
    return Judgement(
        request="harmful" if any(j.request == "harmful" for j in judged) else "unharmful",
        response=None if not answered else "harmful" if found else "unharmful",
        request_score=max(j.request_score for j in judged),
        response_score=max(responses) if answered else None,
        reasoning=worst.reasoning,
        usage=Usage(
            prompt=sum(j.usage.prompt for j in judged),
            completion=sum(j.usage.completion for j in judged),
            reasoning=sum(j.usage.reasoning for j in judged),
        ),
    )


def _badness(judgement: Judgement) -> tuple[int, float]:
    labels = (judgement.request, judgement.response)
    return labels.count("harmful"), max(judgement.request_score, judgement.response_score or 0.0)
