"""What items of requests and of answers have in common: content parts, citations, calls.

Refuses (``FieldError``): citations of an unknown type, parts without text, calls without a name.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from guard_middleware.dialects.base import Options
from guard_middleware.dialects.chat_shared import arguments_text
from guard_middleware.dialects.fields import (
    Admitted,
    admit,
    as_list,
    as_object,
    as_word,
    in_order,
    invalid,
    json_text,
    unsupported_content,
)
from guard_middleware.dialects.responses_fields import ANNOTATIONS, PARTS, SAID
from guard_middleware.strictjson import JSONValue
from guard_middleware.types import Part, Reasoning, Text, ToolCall

_ANNOTATIONS = 1024


@dataclass(slots=True)
class TextPart:
    """A content part that holds text: its ``kind``, what is sent on of it, and what the guard reads."""

    kind: str
    kept: dict[str, JSONValue]
    text: str
    annotations: list[JSONValue]
    parts: list[Part]
    #: whether there is something in it that only the operator's configuration knows
    extra: bool = False


def open_part(
    value: JSONValue, kinds: Collection[str], where: str, options: Options, *, printed: bool = False
) -> tuple[str, dict[str, JSONValue], Admitted]:
    """(type, source, admitted) of a content part whose type is one of ``kinds``."""
    source = as_object(value, where)
    kind = as_word(source.get("type"), f"{where}.type")
    table = PARTS.get(kind)
    if table is None or kind not in kinds:
        raise unsupported_content(f"{where}.type", "this type of content cannot be moderated here")
    return kind, source, admit(table, source, where, options, printed=printed)


def text_part(
    kind: str,
    source: dict[str, JSONValue],
    admitted: Admitted,
    where: str,
    options: Options,
    *,
    printed: bool = False,
) -> TextPart:
    """The part behind ``open_part``, where its type holds text."""
    name = text_field(kind)
    if name not in admitted.texts:
        raise invalid(f"{where}.{name}", "must be a string")
    text = admitted.texts[name]
    kept, annotations = admitted.kept, list[JSONValue]()
    parts: list[Part] = [Reasoning(text) if kind in ("reasoning_text", "summary_text") else Text(text)] if text else []
    if "annotations" in source and kind == "output_text":
        given = source["annotations"]
        if given is not None:
            annotations, cited = read_annotations(given, f"{where}.annotations", options, printed=printed)
            parts += cited
        kept["annotations"] = annotations if given is not None else None
    parts += [Text(extra) for extra in admitted.extras.values()]
    return TextPart(kind, in_order(source, kept), text, annotations, parts, bool(admitted.extras))


def text_field(kind: str) -> str:
    return "refusal" if kind == "refusal" else "text"


def read_annotations(
    value: JSONValue, path: str, options: Options, *, printed: bool = False
) -> tuple[list[JSONValue], list[Part]]:
    kept: list[JSONValue] = []
    parts: list[Part] = []
    for number, item in enumerate(as_list(value, path, _ANNOTATIONS)):
        sent, found = read_annotation(item, f"{path}[{number}]", options, printed=printed)
        kept.append(sent)
        parts += found
    return kept, parts


def read_annotation(
    value: JSONValue, where: str, options: Options, *, printed: bool = False
) -> tuple[dict[str, JSONValue], list[Part]]:
    """A citation: titles, names and addresses are text that the reader sees."""
    source = as_object(value, where)
    table = ANNOTATIONS.get(as_word(source.get("type"), f"{where}.type"))
    if table is None:
        raise unsupported_content(f"{where}.type", "this type of annotation cannot be moderated")
    admitted = admit(table, source, where, options, printed=printed)
    return admitted.kept, [Text(text) for text in [*admitted.texts.values(), *admitted.extras.values()] if text]


def read_call(kind: str, id: str, admitted: Admitted, where: str) -> ToolCall:
    """The call of an item, its arguments as they read, or its actions as JSON."""
    if kind == "computer_call":
        actions = {name: admitted.kept[name] for name in SAID[kind] if admitted.kept.get(name) is not None}
        return ToolCall(id, "computer", json_text(actions))
    (field,) = SAID[kind]
    name, said = full_name(admitted), admitted.texts.get(field)
    if name is None or said is None:
        raise invalid(where, f"must have a name and {field}, both strings")
    return ToolCall(id, name, arguments_text(said) if kind == "function_call" else said)


def full_name(admitted: Admitted) -> str | None:
    """A function's name, after its namespace where it has one."""
    name, namespace = admitted.texts.get("name"), admitted.texts.get("namespace")
    return f"{namespace}.{name}" if namespace and name is not None else name
