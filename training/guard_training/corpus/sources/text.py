"""Readers of the four text sources. Label rules are GuardReasoner's (its released data preparation)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from guard_middleware.types import Label
from guard_training.corpus.sources.fields import (
    Fields,
    Foreign,
    Unusable,
    flag,
    harmful,
    label,
    optional,
    optional_text,
    text,
    value,
)

_HARM: Mapping[str, Label | None] = {"harmful": "harmful", "unharmful": "unharmful", "none": None}


def wildguard(record: Mapping[str, Any]) -> Fields:
    """``prompt, adversarial, response, prompt_harm_label, response_refusal_label, response_harm_label, subcategory``.

    The labels as they stand; ``response`` and its label are null for rows of a prompt alone.
    """
    value(record, "response")
    response = optional_text(record, "response")
    answered = label(value(record, "response_harm_label"), _HARM, "response_harm_label")
    return Fields(
        prompt=text(record, "prompt"),
        request=label(value(record, "prompt_harm_label"), _HARM, "prompt_harm_label"),
        response=response,
        response_label=answered if response else None,
        category=optional_text(record, "subcategory"),
    )


def aegis(record: Mapping[str, Any]) -> Fields:
    """``id, text, text_type, num_annotations, labels_0 .. labels_4``; a label is ``Safe`` or a list of categories.

    The most frequent annotation (the first of several equally frequent) decides: ``Safe`` is unharmful, whatever
    else (``Needs Caution`` too) harmful. All of ``text`` is the prompt, dialogues included, as in GuardReasoner.
    """
    given = [optional(record, f"labels_{number}") for number in range(5)]
    votes = [str(vote).strip() for vote in given if vote is not None]
    if not votes:
        raise Unusable("no annotation in labels_0 to labels_4")
    verdict = Counter(votes).most_common(1)[0][0]
    safe = verdict == "Safe"
    return Fields(text(record, "text"), harmful(not safe), category=None if safe else verdict)


def beavertails(record: Mapping[str, Any]) -> Fields:
    """``prompt, response, category (object of 14 booleans), is_safe``: labels the answer, ``is_safe`` is unharmful."""
    found = optional(record, "category")
    named = [str(name) for name, holds in found.items() if holds] if isinstance(found, Mapping) else []
    return Fields(
        prompt=text(record, "prompt"),
        request=None,
        response=text(record, "response"),
        response_label=harmful(not flag(record, "is_safe")),
        category=", ".join(named) or None,
    )


def toxicchat(record: Mapping[str, Any]) -> Fields:
    """``conv_id, user_input, model_output, human_annotation, toxicity, jailbreaking, openai_moderation``.

    Only rows that a human annotated; ``toxicity`` 1 is a harmful request. The answer is unlabelled, and left out.
    """
    if not flag(record, "human_annotation"):
        raise Foreign("not annotated by a human")
    jailbreak = "jailbreaking" in record and flag(record, "jailbreaking")
    return Fields(
        text(record, "user_input"), harmful(flag(record, "toxicity")), category="jailbreak" if jailbreak else None
    )
