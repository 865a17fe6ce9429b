"""A Responses request, read into a Conversation and a body that holds nothing else.

Everything that can reach the model is moderated: instructions, messages of every role, reasoning, calls and their
results with their images, tool definitions, output schemas, forced tools. Neighbouring items of the assistant are
one Message, as in the other dialects. Ids of calls, which chat templates show the model, are renamed consistently
(``call00001``, ...); where the request continues a stored answer they must stay what they were, and the guard
reads them.

Refuses:
- unknown items, roles, content parts and tools, and fields that can carry content;
- what the upstream keeps and nobody here read: item references, stored prompts, conversations, files by id;
- tools that the upstream runs itself, answers in the background, truncation, log probabilities;
- files and audio, more images than the limit, values of the wrong type.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from guard_middleware.dialects.base import MediaSite, Options, ParsedRequest
from guard_middleware.dialects.fields import (
    Admitted,
    FieldError,
    Rule,
    Table,
    admit,
    as_flag,
    as_identifier,
    as_list,
    as_object,
    as_str,
    as_word,
    in_order,
    invalid,
    json_text,
    refuse_guards,
    unsupported_content,
    unsupported_field,
)
from guard_middleware.dialects.request_shared import read_metadata, rejecting, unusual
from guard_middleware.dialects.responses_fields import (
    FORMATS,
    INCLUDE,
    INPUT_ITEMS,
    REASONING,
    REQUEST,
    ROLE_PARTS,
    TEXT,
    TOOLS,
)
from guard_middleware.dialects.responses_items import full_name, open_part, read_call, text_part
from guard_middleware.errors import RejectKind
from guard_middleware.limits import Limits
from guard_middleware.references import to_data_url
from guard_middleware.strictjson import JSONValue
from guard_middleware.types import (
    Conversation,
    Definition,
    Message,
    Part,
    Role,
    Text,
    ToolCallResponse,
    Uri,
)

_ITEMS = 4096
_PARTS = 1024
_TOOLS = 128
_INCLUDES = 16
_ROLE: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_OUTPUT = ("input_text", "input_image")
_Path = tuple[str | int, ...]


def parse_request(body: JSONValue, limits: Limits, options: Options) -> ParsedRequest:
    """Read a request body; raises ``RequestRejected`` and nothing else."""
    return rejecting(lambda: _Reader(limits, options).request(body))


@dataclass(slots=True)
class _Reader:
    limits: Limits
    options: Options
    sites: list[MediaSite] = field(default_factory=list)
    definitions: list[Definition] = field(default_factory=list)
    ids: dict[str, str] = field(default_factory=dict)
    continued: bool = False

    def request(self, body: JSONValue) -> ParsedRequest:
        source = as_object(body, "")
        refuse_guards(source.keys() - REQUEST.keys() - self.options.extra_fields.keys())
        admitted = admit(REQUEST, source, "", self.options)
        kept = admitted.kept
        continues = kept.get("previous_response_id")
        self.continued = continues is not None
        if source.get("tools") is not None:
            kept["tools"] = self.tools(source["tools"], "tools")
        self.settings(source, kept)
        self.definitions += [Definition(name, text) for name, text in admitted.extras.items()]
        self.definitions += unusual(REQUEST, kept)
        messages = [Message("system", (Text(text),)) for text in admitted.texts.values()]  # the instructions
        kept["input"], said = self.input(source.get("input"))
        stream, model = as_flag(source.get("stream"), "stream"), kept.get("model")
        return ParsedRequest(
            dialect="responses",
            conversation=Conversation((*messages, *_joined(said)), tuple(self.definitions)),
            body=in_order(source, kept),
            model=model if isinstance(model, str) else None,
            stream=stream,
            choices=1,
            include_usage=stream,
            sites=tuple(self.sites),
            place=to_data_url,
            continues=continues if isinstance(continues, str) else None,
        )

    def settings(self, source: dict[str, JSONValue], kept: dict[str, JSONValue]) -> None:
        """The options that hold more than one value."""
        if source.get("text") is not None:
            kept["text"] = self.text(as_object(source["text"], "text"))
        if source.get("reasoning") is not None:
            kept["reasoning"] = self.setting(REASONING, source["reasoning"], "reasoning")
        if source.get("metadata") is not None:
            kept["metadata"], notes = read_metadata(source["metadata"])
            self.definitions += notes
        for index, name in enumerate(as_list(source.get("include") or [], "include", _INCLUDES)):
            if not isinstance(name, str) or name not in INCLUDE:
                raise unsupported_field(f"include[{index}]", "is not available, because it cannot be moderated")
        if source.get("truncation") not in (None, "disabled"):
            raise unsupported_field("truncation", "is not available: the model would read less than was moderated")
        names = [name for name, rule in REQUEST.items() if rule is Rule.NESTED and name in source]
        kept |= {name: source[name] for name in names if name not in kept}

    def setting(self, table: Table, value: JSONValue, path: str) -> dict[str, JSONValue]:
        admitted = admit(table, value, path, self.options)
        self.definitions += [Definition(name, text) for name, text in admitted.extras.items()]
        self.definitions += unusual(table, admitted.kept, path)
        return admitted.kept

    def text(self, source: dict[str, JSONValue]) -> dict[str, JSONValue]:
        kept = self.setting(TEXT, source, "text")
        if (given := source.get("format")) is not None:
            shape = as_object(given, "text.format")
            table = FORMATS.get(as_word(shape.get("type"), "text.format.type"))
            if table is None:
                raise unsupported_content("text.format.type", "this type of format cannot be moderated")
            kept["format"] = inner = admit(table, shape, "text.format", self.options, printed=True).kept
            if len(inner) > 1:
                self.definitions.append(Definition("response_format", json_text(inner)))
        return in_order(source, kept)

    def tools(self, value: JSONValue, path: str, *, inner: bool = False) -> list[JSONValue]:
        kept: list[JSONValue] = []
        for index, item in enumerate(as_list(value, path, _TOOLS)):
            where = f"{path}[{index}]"
            source = as_object(item, where)
            table = TOOLS.get(as_word(source.get("type"), f"{where}.type"))
            if table is None or (inner and "tools" in table):
                raise unsupported_content(f"{where}.type", "this type of tool cannot be moderated")
            kept.append(self.tool(table, source, where))
        return kept

    def tool(self, table: Table, source: dict[str, JSONValue], where: str) -> dict[str, JSONValue]:
        admitted = admit(table, source, where, self.options, printed=True)
        if "name" in table and "name" not in admitted.texts:
            raise invalid(f"{where}.name", "must be a string")
        told = {name: source[name] for name in source if name in admitted.texts}
        if told:
            self.definitions.append(Definition("tool", json_text(told)))
        self.definitions += [Definition("tool", text) for text in admitted.extras.values()]
        if "tools" in table:
            admitted.kept["tools"] = self.tools(source.get("tools"), f"{where}.tools", inner=True)
        return in_order(source, admitted.kept)

    def input(self, value: JSONValue) -> tuple[JSONValue, list[Message]]:
        if isinstance(value, str):
            return value, [Message("user", (Text(value),))]
        items = as_list(value, "input", _ITEMS)
        if not items:
            raise invalid("input", "must not be empty")
        kept: list[JSONValue] = []
        messages: list[Message] = []
        for index, item in enumerate(items):
            sent, message = self.item(as_object(item, f"input[{index}]"), f"input[{index}]", ("input", index))
            kept.append(sent)
            messages.append(message)
        return kept, messages

    def item(self, source: dict[str, JSONValue], where: str, path: _Path) -> tuple[JSONValue, Message]:
        kind = as_word(source.get("type", "message" if "role" in source else None), f"{where}.type")
        table = INPUT_ITEMS.get(kind)
        if table is None:
            raise unsupported_content(f"{where}.type", "this type of item cannot be moderated")
        admitted = admit(table, source, where, self.options, printed=True)
        kept = admitted.kept
        role: Role = "assistant"
        parts: list[Part] = []
        id = ""
        if "call_id" in table and (source.get("call_id") is not None or not kind.endswith("_output")):
            id = kept["call_id"] = self.id(source.get("call_id"), f"{where}.call_id")
        if kind == "message":
            name = as_word(source.get("role"), f"{where}.role")
            if name not in ROLE_PARTS:
                raise unsupported_content(f"{where}.role", "is not a role of this API")
            role = _ROLE[name]
            kept["content"], parts = self.content(source, "content", where, path, ROLE_PARTS[name])
        elif kind == "reasoning":
            for name, part in (("summary", "summary_text"), ("content", "reasoning_text")):
                if source.get(name) is not None:
                    kept[name], found = self.parts(source[name], f"{where}.{name}", (*path, name), (part,))
                    parts += found
                elif name in source:
                    kept[name] = None
        elif kind.endswith("_output"):
            role = "tool"
            kept["output"], said = self.output(kind, source, where, path)
            parts = [ToolCallResponse(id, part.text) if isinstance(part, Text) else part for part in said]
        else:
            parts = [read_call(kind, id, admitted, where)]
        parts += _unread(admitted)
        return in_order(source, kept), Message(role, tuple(parts), full_name(admitted) if role == "tool" else None)

    def output(self, kind: str, source: dict[str, JSONValue], where: str, path: _Path) -> tuple[JSONValue, list[Part]]:
        """What a tool answered: a text, parts, or the picture of a screen."""
        if kind != "computer_call_output":
            return self.content(source, "output", where, path, _OUTPUT)
        place = (*path, "output")
        return self.part(source.get("output"), f"{where}.output", place, ("computer_screenshot",))

    def content(
        self, source: dict[str, JSONValue], name: str, where: str, path: _Path, kinds: Collection[str]
    ) -> tuple[JSONValue, list[Part]]:
        value = source.get(name)
        if isinstance(value, str):
            return value, [Text(value)]
        if not isinstance(value, list):
            raise invalid(f"{where}.{name}", "must be a string or an array of parts")
        return self.parts(value, f"{where}.{name}", (*path, name), kinds)

    def parts(
        self, value: JSONValue, where: str, path: _Path, kinds: Collection[str]
    ) -> tuple[list[JSONValue], list[Part]]:
        kept: list[JSONValue] = []
        parts: list[Part] = []
        for number, item in enumerate(as_list(value, where, _PARTS)):
            sent, found = self.part(item, f"{where}[{number}]", (*path, number), kinds)
            kept.append(sent)
            parts += found
        return kept, parts

    def part(
        self, value: JSONValue, where: str, path: _Path, kinds: Collection[str]
    ) -> tuple[dict[str, JSONValue], list[Part]]:
        kind, source, admitted = open_part(value, kinds, where, self.options, printed=True)
        if kind not in ("input_image", "computer_screenshot"):
            said = text_part(kind, source, admitted, where, self.options, printed=True)
            return said.kept, said.parts
        uri = as_str(source.get("image_url"), f"{where}.image_url")
        if len(self.sites) >= self.limits.images:
            raise FieldError(RejectKind.TOO_MANY_IMAGES, where, f"more than {self.limits.images} images")
        self.sites.append(MediaSite(uri, (*path, "image_url")))
        extras = [Text(text) for text in admitted.extras.values()]
        return in_order(source, admitted.kept | {"image_url": uri}), [Uri(uri), *extras]

    def id(self, value: JSONValue, path: str) -> str:
        if not self.continued:  # as the chat dialect renames them
            return self.ids.setdefault(as_str(value, path), f"call{len(self.ids) + 1:05d}")
        id = as_identifier(value, path)
        if id not in self.ids:
            self.ids[id] = id
            self.definitions.append(Definition("call_id", id))
        return id


def _unread(admitted: Admitted) -> list[Part]:
    """Texts of an item that its reader left: checks that a screen's user acknowledged, fields of the operator's."""
    checks = [text for name, text in admitted.texts.items() if name == "acknowledged_safety_checks"]
    return [Text(text) for text in [*checks, *admitted.extras.values()] if text]


def _joined(messages: list[Message]) -> list[Message]:
    """Neighbouring items of the assistant as one message."""
    joined: list[Message] = []
    for message in messages:
        if joined and message.role == "assistant" == joined[-1].role:
            joined[-1] = Message("assistant", (*joined[-1].parts, *message.parts))
        else:
            joined.append(message)
    return joined
