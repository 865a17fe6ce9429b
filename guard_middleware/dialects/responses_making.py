"""One output item of a streamed Responses answer in the making: what was said of it, and whether repeats agree.

Refuses (``FieldError``): an item that ends as another type or call than it began, texts and citations that are
repeated differently, indexes that are none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from guard_middleware.dialects.fields import invalid
from guard_middleware.dialects.responses_response import Item
from guard_middleware.strictjson import JSONValue

#: deltas and their ends: which text of the item they say
TEXTS = {
    "response.output_text": "output_text",
    "response.refusal": "refusal",
    "response.reasoning_text": "reasoning_text",
    "response.reasoning_summary_text": "summary_text",
    "response.function_call_arguments": "arguments",
    "response.custom_tool_call_input": "input",
}
REASONING = ("reasoning_text", "summary_text")
#: part types by the event that opens or closes them
PART_TYPES = {
    "response.content_part": ("output_text", "refusal", "reasoning_text"),
    "response.reasoning_part": ("reasoning_text",),
    "response.reasoning_summary_part": ("summary_text",),
}
ITEM_PARTS = {
    "message": ("output_text", "refusal"),
    "reasoning": ("reasoning_text", "summary_text"),
    "function_call": ("arguments",),
    "custom_tool_call": ("input",),
}


@dataclass(slots=True)
class Making:
    """One output item in the making: its texts and citations so far, and the whole item once it was closed."""

    kind: str
    call_id: JSONValue = None
    texts: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    notes: dict[int, list[JSONValue]] = field(default_factory=dict)
    #: texts that were said to their end, and parts that were closed
    closed: set[tuple[str, int]] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    done: Item | None = None

    def parts(self, kind: str) -> int:
        """How many parts there are in the list that holds parts of this type."""
        among = ("summary_text",) if kind == "summary_text" else ("output_text", "refusal", "reasoning_text")
        return sum(name in among for name, _ in self.texts)

    def close(self, whole: Item) -> None:
        """Takes the whole item as what was said; what comes after must repeat it."""
        self.done = whole
        self.texts = {key: [text] for key, text in whole.texts.items()}
        self.notes = dict(whole.notes)

    def matches(self, whole: Item, where: str) -> bool:
        """Whether ``whole`` says nothing new; raises where it says something else."""
        if whole.kind != self.kind or whole.kept.get("call_id") != self.call_id:
            raise invalid(f"{where}.type", "is not that of the item that was opened")
        for key, pieces in self.texts.items():
            if "".join(pieces) != whole.texts.get(key, ""):
                raise invalid(f"{where}.{key[0]}", "is not what was streamed")
        for number, notes in self.notes.items():
            if notes != whole.notes.get(number):
                raise invalid(f"{where}.annotations", "are not those that were streamed")
        new = [key for key, text in whole.texts.items() if text and key not in self.texts]
        return not new and whole.notes.keys() <= self.notes.keys()


def counter(kind: str) -> str:
    return "summary_index" if kind == "summary_text" else "content_index"


def read_place(source: dict[str, JSONValue], name: str, most: int) -> int:
    value = source.get(name)
    if type(value) is not int or not 0 <= value < most:
        raise invalid(name, f"must be an integer from 0 to {most - 1}")
    return value
