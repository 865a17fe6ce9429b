"""What requests, answers and streams of the Chat Completions API have in common: named calls and citations."""

from __future__ import annotations

import re

from guard_middleware.dialects.base import Options
from guard_middleware.dialects.chat_fields import ANNOTATION, URL_CITATION
from guard_middleware.dialects.fields import Table, admit, as_list, as_object, in_order, invalid, unsupported_content
from guard_middleware.strictjson import JSONValue
from guard_middleware.types import Part, Text

#: tool calls of one message
MOST_CALLS = 128
_ANNOTATIONS = 1024
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)


def arguments_text(arguments: str) -> str:
    """The arguments of a function as who parses them reads them: ``\\uXXXX`` is its character.

    Clients parse them, and so do chat templates before they print them; many writers escape all but ASCII.
    """
    if "\\u" not in arguments:
        return arguments

    def character(escape: re.Match[str]) -> str:
        code = int(escape[1] or "0", 16)
        return chr(code) if code >= 32 or code in (9, 10, 13) else escape[0]

    return _ESCAPE.sub(character, arguments).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_named(
    table: Table, value: JSONValue, path: str, options: Options, *, printed: bool = False
) -> tuple[dict[str, JSONValue], str, str, list[Part]]:
    """(what is kept, name, arguments or input as they read, extras) of the inner object of a whole call."""
    admitted = admit(table, value, path, options, printed=printed)
    name, arguments = (admitted.texts.get(key) for key in table)
    if name is None or arguments is None:
        raise invalid(path, "must have a name and arguments, both strings")
    if "arguments" in table:
        arguments = arguments_text(arguments)
    return admitted.kept, name, arguments, [Text(text) for text in admitted.extras.values()]


def read_annotations(
    value: JSONValue, path: str, options: Options, *, printed: bool = False
) -> tuple[list[JSONValue], list[Part]]:
    """Citations: titles and addresses are text that the reader sees."""
    kept: list[JSONValue] = []
    parts: list[Part] = []
    for number, item in enumerate(as_list(value, path, _ANNOTATIONS)):
        where = f"{path}[{number}]"
        source = as_object(item, where)
        if source.get("type") != "url_citation":
            raise unsupported_content(f"{where}.type", "this type of annotation cannot be moderated")
        outer = admit(ANNOTATION, source, where, options, printed=printed)
        inner = admit(URL_CITATION, source.get("url_citation"), f"{where}.url_citation", options, printed=printed)
        kept.append(in_order(source, outer.kept | {"url_citation": inner.kept}))
        texts = [*inner.texts.values(), *inner.extras.values(), *outer.extras.values()]
        parts += [Text(text) for text in texts if text]
    return kept, parts
