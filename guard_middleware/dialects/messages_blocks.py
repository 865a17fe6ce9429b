"""Content blocks of the Messages API, as they stand in requests, in answers and at the start of streamed blocks.

Every block is read by its table (``messages_fields.BLOCKS``) where its place allows its type. What stands below a
block (sources of images and documents, citations, nested content, results of server-run tools) has tables too.

Refuses: unknown block, source, citation and result types, and those that a place does not allow; images where the
reader was given no way to take them; files, PDFs and documents by URL; content that is not of the declared type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from guard_middleware.dialects.answer_shared import unread_id
from guard_middleware.dialects.base import Options
from guard_middleware.dialects.fields import (
    Admitted,
    Table,
    admit,
    as_list,
    as_object,
    as_str,
    as_word,
    in_order,
    invalid,
    json_text,
    unsupported_content,
)
from guard_middleware.dialects.messages_fields import (
    BLOCKS,
    CALLER,
    CITATIONS,
    DOCUMENT_SOURCES,
    IMAGE_SOURCES,
    PLACES,
    RESULTS,
)
from guard_middleware.strictjson import JSONValue
from guard_middleware.types import Part, Reasoning, Text, ToolCall, ToolCallResponse, Uri

Path = tuple[str | int, ...]

_BLOCKS = 4096
_CITATIONS = 1024
_IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp")
CALLS = frozenset({"tool_use", "server_tool_use"})


def typed(tables: Mapping[str, Table | None], value: JSONValue, where: str) -> tuple[dict[str, JSONValue], str, Table]:
    """(object, its type, its table); refuses a type that has none."""
    source = as_object(value, where)
    kind = as_word(source.get("type"), f"{where}.type")
    table = tables.get(kind)
    if table is None:
        raise unsupported_content(f"{where}.type", "this type of content cannot be moderated")
    return source, kind, table


@dataclass(frozen=True, slots=True)
class BlockReader:
    """Reads blocks. ``id`` says what becomes of the id of a call; ``image`` takes an image's uri and its place.

    ``printed`` is for requests: what stands in a block may be printed into a prompt with all its keys.
    """

    options: Options
    printed: bool
    id: Callable[[JSONValue, str], str]
    image: Callable[[str, str, Path], None] | None = None

    def content(self, value: JSONValue, place: str, where: str, path: Path) -> tuple[JSONValue, list[Part]]:
        """A string, or blocks of the types that ``place`` allows."""
        if isinstance(value, str):
            return value, [Text(value)]
        found = list(self.each(value, place, where, path))
        return [sent for sent, _ in found], [part for _, parts in found for part in parts]

    def each(
        self, value: JSONValue, place: str, where: str, path: Path
    ) -> Iterator[tuple[dict[str, JSONValue], list[Part]]]:
        """The blocks of a list, one by one: what is kept of each, and what it says."""
        if not isinstance(value, list):
            raise invalid(where, "must be a string or an array of blocks")
        for number, item in enumerate(as_list(value, where, _BLOCKS)):
            yield self.block(item, place, f"{where}[{number}]", (*path, number))

    def block(self, value: JSONValue, place: str, where: str, path: Path) -> tuple[dict[str, JSONValue], list[Part]]:
        """What is kept of one block, and what it says."""
        source, kind, table = typed(BLOCKS, value, where)
        if kind not in PLACES[place]:
            raise unsupported_content(f"{where}.type", "this type of content cannot be moderated here")
        admitted = self._admit(table, source, where)
        kept = admitted.kept
        parts: list[Part]
        match kind:
            case "text":
                parts = [Text(_needed(admitted, "text", where))]
                if "citations" in source:
                    kept["citations"], cited = self.citations(source["citations"], f"{where}.citations")
                    parts += [Text(cited)] if cited else []
            case "thinking":
                parts = [Reasoning(_needed(admitted, "thinking", where))]
            case "redacted_thinking":
                as_str(source.get("data"), f"{where}.data")
                parts = []
            case "image":
                kept["source"], parts = self._image(source.get("source"), f"{where}.source", (*path, "source"))
            case "document":
                parts = [Text(text) for text in admitted.texts.values()]
                kept["source"], found = self._document(source.get("source"), f"{where}.source", (*path, "source"))
                parts += found
            case "search_result":
                parts = [Text(text) for text in admitted.texts.values()]
                as_list(source.get("content"), f"{where}.content", _BLOCKS)
                kept["content"], found = self.content(source["content"], kind, f"{where}.content", (*path, "content"))
                parts += found
            case "tool_result":
                parts = self._tool_result(source, kept, where, path)
            case "tool_use" | "server_tool_use":
                parts = self._call(source, kept, where)
            case _ if "tool_use_id" in table:
                kept["tool_use_id"], unread = self._id(source.get("tool_use_id"), f"{where}.tool_use_id")
                kept["content"], texts = self._result(source.get("content"), f"{where}.content")
                parts = [*(ToolCallResponse(str(kept["tool_use_id"]), text) for text in texts), *unread]
            case _:
                parts = [Text(text) for text in admitted.texts.values()]
        if kind in CALLS | {"tool_result"} and (toolset := admitted.texts.get("toolset_name")) is not None:
            parts.append(Text(toolset))
        parts += [Text(text) for text in admitted.extras.values()]
        return in_order(source, kept) | kept, parts

    def citations(self, value: JSONValue, where: str) -> tuple[JSONValue, str]:
        """Citations, and the text in them as one."""
        if value is None:
            return None, ""
        kept: list[JSONValue] = []
        texts = ""
        for number, item in enumerate(as_list(value, where, _CITATIONS)):
            sent, text = self.citation(item, f"{where}[{number}]")
            kept.append(sent)
            texts += text
        return kept, texts

    def citation(self, value: JSONValue, where: str) -> tuple[JSONValue, str]:
        """One citation, and its titles, addresses and quotes, a line each."""
        source, _, table = typed(CITATIONS, value, where)
        admitted = self._admit(table, source, where)
        texts = [*admitted.texts.values(), *admitted.extras.values()]
        return in_order(source, admitted.kept), "".join(f"{text}\n" for text in texts if text)

    def _admit(self, table: Table, source: JSONValue, where: str) -> Admitted:
        return admit(table, source, where, self.options, printed=self.printed)

    def _call(self, source: dict[str, JSONValue], kept: dict[str, JSONValue], where: str) -> list[Part]:
        name = as_str(source.get("name"), f"{where}.name")
        kept["id"], unread = self._id(source.get("id"), f"{where}.id", name)
        kept["input"] = arguments = as_object(source.get("input") or {}, f"{where}.input")
        parts: list[Part] = [ToolCall(str(kept["id"]), name, json_text(arguments)), *unread]
        if source.get("caller") is not None:
            caller = as_object(source["caller"], f"{where}.caller")
            by = self._admit(CALLER, caller, f"{where}.caller")
            if "tool_id" in caller:
                by.kept["tool_id"], unread = self._id(caller["tool_id"], f"{where}.caller.tool_id")
                parts += unread
            kept["caller"] = by.kept
            parts += [Text(text) for text in by.extras.values()]
        return parts

    def _id(self, value: JSONValue, where: str, name: str = "") -> tuple[str, list[Text]]:
        """(what is kept of the id of a call, what the guard reads of it); ``name`` is that of the call."""
        id = self.id(value, where)
        return id, [] if self.printed else unread_id(id, name)

    def _tool_result(
        self, source: dict[str, JSONValue], kept: dict[str, JSONValue], where: str, path: Path
    ) -> list[Part]:
        kept["tool_use_id"] = id = self.id(source.get("tool_use_id"), f"{where}.tool_use_id")
        if source.get("content") is None:
            return [ToolCallResponse(id, "")]
        kept["content"], found = self.content(source["content"], "tool_result", f"{where}.content", (*path, "content"))
        return [ToolCallResponse(id, part.text) if isinstance(part, Text) else part for part in found]

    def _result(self, value: JSONValue, where: str) -> tuple[JSONValue, list[str]]:
        source, _, table = typed(RESULTS, value, where)
        admitted = self._admit(table, source, where)
        texts = [*admitted.texts.values(), *admitted.extras.values()]
        return in_order(source, admitted.kept), [text for text in texts if text]

    def _image(self, value: JSONValue, where: str, path: Path) -> tuple[JSONValue, list[Part]]:
        source, kind, table = typed(IMAGE_SOURCES, value, where)
        if self.image is None:
            raise unsupported_content(where, "an image cannot be moderated here")
        admitted = self._admit(table, source, where)
        if kind == "url":
            uri = as_str(source.get("url"), f"{where}.url")
            kept = admitted.kept | {"url": uri}
        else:
            data = as_str(source.get("data"), f"{where}.data")
            if source.get("media_type") not in _IMAGE_TYPES:
                raise unsupported_content(f"{where}.media_type", "this type of image cannot be moderated")
            uri = f"data:{source['media_type']};base64,{data}"
            kept = admitted.kept | {"data": data}
        self.image(uri, where, path)
        return in_order(source, kept), [Uri(uri), *(Text(text) for text in admitted.extras.values())]

    def _document(self, value: JSONValue, where: str, path: Path) -> tuple[JSONValue, list[Part]]:
        source, kind, table = typed(DOCUMENT_SOURCES, value, where)
        admitted = self._admit(table, source, where)
        kept = admitted.kept
        extras: list[Part] = [Text(text) for text in admitted.extras.values()]
        if kind == "text":
            if source.get("media_type") not in (None, "text/plain"):
                raise unsupported_content(f"{where}.media_type", "this type of document cannot be moderated")
            return in_order(source, kept), [Text(_needed(admitted, "data", where)), *extras]
        kept["content"], parts = self.content(source.get("content"), "document", f"{where}.content", (*path, "content"))
        return in_order(source, kept), [*parts, *extras]


def _needed(admitted: Admitted, name: str, where: str) -> str:
    if name not in admitted.texts:
        raise invalid(f"{where}.{name}", "must be a string")
    return admitted.texts[name]
