"""The ``moderation`` object of the Chat Completions API, filled from our notices.

``input`` and ``output`` are each ``moderation_results`` or ``error``, as the openai SDK types them. This guard
gives one score, so there is one scored category, ``harmful``; categories that the guard names are true beside it.
What the API has no place for (decision ids, reasoning that policy shows) goes to the top-level key ``x_guard``.
"""

from __future__ import annotations

from guard_middleware.dialects.base import Notice, Ruling
from guard_middleware.strictjson import JSONValue


def explain(ruling: Ruling) -> dict[str, JSONValue]:
    """Top-level keys to add to an answer or to its last chunk; none where there is nothing to say."""
    if not ruling.annotated:
        return {}
    outputs = [notice for _, notice in sorted(ruling.choices.items())]
    inputs = [ruling.request] if ruling.request else []
    extra: dict[str, JSONValue] = {
        "input": [_x_guard(notice, None) for notice in inputs],
        "output": [_x_guard(notice, index) for index, notice in sorted(ruling.choices.items())],
    }
    return {"moderation": {"input": _side(inputs), "output": _side(outputs)}, "x_guard": extra}


def _side(notices: list[Notice]) -> JSONValue:
    judged = [notice for notice in notices if notice.flagged is not None]
    if not judged:
        error = next((notice.error for notice in notices if notice.error), None)
        code = "guard_unavailable" if error else "not_moderated"
        return {"type": "error", "code": code, "message": "There is no verdict on this content."}
    return {
        "type": "moderation_results",
        "model": judged[0].model,
        "results": [_result(notice) for notice in judged],
    }


def _result(notice: Notice) -> JSONValue:
    categories: dict[str, JSONValue] = {"harmful": notice.flagged, **dict.fromkeys(notice.categories, True)}
    return {
        "type": "moderation_result",
        "model": notice.model,
        "flagged": notice.flagged,
        "categories": categories,
        "category_scores": {} if notice.score is None else {"harmful": notice.score},
        "category_applied_input_types": {name: list(notice.input_types) for name in categories},
    }


def _x_guard(notice: Notice, choice: int | None) -> JSONValue:
    said: dict[str, JSONValue] = {"decision_id": notice.id, "action": notice.action.value}
    if choice is not None:
        said["choice"] = choice
    if notice.reasoning is not None:
        said["reasoning"] = notice.reasoning
    return said
