"""A Chat Completions request, read into a Conversation and a body that holds nothing else.

Everything that can reach the model is moderated: messages of every role, names, refusals, reasoning, tool calls
and their results, tool definitions, output schemas, predictions, stop strings, forced tools, and the names of
unknown fields in them, for chat templates print whole tools and calls. What it must not be able to say
(``chat_fields`` has every field) is refused. Ids of tool calls are the one thing that chat templates show the
model and no guard reads, so they are renamed consistently (``call00001``, ...) in what is sent on.

Refuses:
- unknown roles, part types, tool types, and fields that can carry content;
- parts where their role does not allow them; messages without content;
- audio, files, web search, server-run tools, token ids, templates, logprobs, ``store``;
- ``n`` above the limit, more images than the limit, values of the wrong type.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from guard_middleware.dialects.base import MediaSite, Options, ParsedRequest
from guard_middleware.dialects.chat_fields import (
    CALL,
    IMAGE_URL,
    PARTS,
    REQUEST,
    ROLE_PARTS,
    ROLES,
    TOOL_CALLS,
    TOOLS,
)
from guard_middleware.dialects.chat_shared import read_annotations, read_named
from guard_middleware.dialects.fields import (
    Admitted,
    FieldError,
    admit,
    as_flag,
    as_list,
    as_object,
    as_str,
    as_word,
    in_order,
    invalid,
    json_text,
    refuse_guards,
    unsupported_content,
)
from guard_middleware.dialects.request_shared import (
    bounded,
    read_bias,
    read_metadata,
    read_stops,
    rejecting,
    unusual,
)
from guard_middleware.errors import RejectKind
from guard_middleware.limits import Limits
from guard_middleware.references import to_data_url
from guard_middleware.strictjson import JSONValue
from guard_middleware.types import (
    Conversation,
    Definition,
    Message,
    Part,
    Reasoning,
    Role,
    Text,
    ToolCall,
    ToolCallResponse,
    Uri,
)

_MESSAGES = 4096
_PARTS = 1024
_TOOLS = 128
_ROLE: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def parse_request(body: JSONValue, limits: Limits, options: Options) -> ParsedRequest:
    """Read a request body; raises ``RequestRejected`` and nothing else."""
    return rejecting(lambda: _Reader(limits, options).request(body))


@dataclass(slots=True)
class _Reader:
    limits: Limits
    options: Options
    sites: list[MediaSite] = field(default_factory=list)
    ids: dict[str, str] = field(default_factory=dict)

    def request(self, body: JSONValue) -> ParsedRequest:
        source = as_object(body, "")
        refuse_guards(source.keys() - REQUEST.keys() - self.options.extra_fields.keys())
        admitted = admit(REQUEST, source, "", self.options)
        kept = admitted.kept
        definitions: list[Definition] = []
        for name, kind in (("tools", "tool"), ("functions", "function")):
            if source.get(name) is not None:
                kept[name], found = self.tools(name, kind, source[name])
                definitions += found
        if (response_format := source.get("response_format")) is not None:
            as_word(as_object(response_format, "response_format").get("type"), "response_format.type")
            kept["response_format"] = response_format
            if len(as_object(response_format, "response_format")) > 1:
                definitions.append(Definition("response_format", json_text(response_format)))
        definitions += [Definition(name, text) for name, text in admitted.texts.items()]
        definitions += [Definition(name, text) for name, text in admitted.extras.items()]
        definitions += unusual(REQUEST, kept)
        if (stop := source.get("stop")) is not None:
            definitions += read_stops(stop)
            kept["stop"] = stop

        kept["messages"], messages = self.messages(source.get("messages"))
        if (metadata := source.get("metadata")) is not None:
            kept["metadata"], notes = read_metadata(metadata)
            definitions += notes
        if (bias := source.get("logit_bias")) is not None:
            kept["logit_bias"] = read_bias(bias)
        if (modalities := source.get("modalities")) is not None:
            if modalities != ["text"]:
                raise unsupported_content("modalities", "only text output can be moderated")
            kept["modalities"] = modalities
        kept |= {name: source[name] for name in ("stream", "n") if name in source}
        stream_options = as_object(kept.get("stream_options") or {}, "stream_options")
        model = kept.get("model")
        return ParsedRequest(
            dialect="chat_completions",
            conversation=Conversation(tuple(messages), tuple(definitions)),
            body=in_order(source, kept),
            model=model if isinstance(model, str) else None,
            stream=as_flag(source.get("stream"), "stream"),
            choices=bounded(source.get("n"), "n", self.limits.choices),
            include_usage=as_flag(stream_options.get("include_usage"), "stream_options.include_usage"),
            sites=tuple(self.sites),
            place=to_data_url,
        )

    def tools(self, name: str, kind: str, value: JSONValue) -> tuple[list[JSONValue], list[Definition]]:
        kept: list[JSONValue] = []
        definitions: list[Definition] = []
        for index, item in enumerate(as_list(value, name, _TOOLS)):
            where = f"{name}[{index}]"
            if name == "tools":
                source = as_object(item, where)
                table = TOOLS.get(as_word(source.get("type"), f"{where}.type"))
                if table is None:
                    raise unsupported_content(f"{where}.type", "this type of tool cannot be moderated")
                as_object(source.get(str(source["type"])), f"{where}.{source['type']}")
                admitted = admit(table, source, where, self.options, printed=True)
                definitions += [Definition(kind, text) for text in (admitted.texts | admitted.extras).values()]
                kept.append(admitted.kept)
            else:
                definitions.append(Definition(kind, json_text(as_object(item, where))))
                kept.append(item)
        return kept, definitions

    def messages(self, value: JSONValue) -> tuple[list[JSONValue], list[Message]]:
        kept: list[JSONValue] = []
        messages: list[Message] = []
        items = as_list(value, "messages", _MESSAGES)
        if not items:
            raise invalid("messages", "must not be empty")
        for index, item in enumerate(items):
            sent, message = self.message(as_object(item, f"messages[{index}]"), index)
            kept.append(sent)
            messages.append(message)
        return kept, messages

    def message(self, source: dict[str, JSONValue], index: int) -> tuple[JSONValue, Message]:
        where = f"messages[{index}]"
        role = as_word(source.get("role"), f"{where}.role")
        table = ROLES.get(role)
        if table is None:
            raise unsupported_content(f"{where}.role", "is not a role of this API")
        admitted = admit(table, source, where, self.options, printed=True)
        kept, texts = admitted.kept, admitted.texts
        parts: list[Part] = [Reasoning(text) for text in _reasoning(admitted)]

        answered = ""
        if role == "tool":
            answered = kept["tool_call_id"] = self.id(source.get("tool_call_id"), f"{where}.tool_call_id")
        if "content" in source:
            kept["content"], content = self.content(source["content"], role, where, index)
            parts += [
                ToolCallResponse(answered, part.text) if _ROLE[role] == "tool" and isinstance(part, Text) else part
                for part in content
            ]
        elif role != "assistant":
            raise invalid(f"{where}.content", "is missing")
        if "refusal" in texts:
            parts.append(Text(texts["refusal"]))
        if role == "assistant":
            if (annotations := source.get("annotations")) is not None:
                kept["annotations"], found = read_annotations(
                    annotations, f"{where}.annotations", self.options, printed=True
                )
                parts += found
            if (calls := source.get("tool_calls")) is not None:
                kept["tool_calls"], asked = self.tool_calls(calls, f"{where}.tool_calls")
                parts += asked
            if (call := source.get("function_call")) is not None:
                kept["function_call"], name, arguments, extra = read_named(
                    CALL["function"], call, f"{where}.function_call", self.options, printed=True
                )
                parts += [ToolCall("", name, arguments), *extra]
        parts += [Text(text) for text in admitted.extras.values()]
        return in_order(source, kept), Message(_ROLE[role], tuple(parts), texts.get("name"))

    def content(self, value: JSONValue, role: str, where: str, index: int) -> tuple[JSONValue, list[Part]]:
        if isinstance(value, str):
            return value, [Text(value)]
        if value is None:
            if role not in ("assistant", "function"):
                raise invalid(f"{where}.content", "must not be null")
            return None, []
        if not isinstance(value, list):
            raise invalid(f"{where}.content", "must be a string or an array of parts")
        kept: list[JSONValue] = []
        parts: list[Part] = []
        for number, item in enumerate(as_list(value, f"{where}.content", _PARTS)):
            sent, found = self.part(item, role, f"{where}.content[{number}]", index, number)
            kept.append(sent)
            parts += found
        return kept, parts

    def part(self, value: JSONValue, role: str, where: str, index: int, number: int) -> tuple[JSONValue, list[Part]]:
        source = as_object(value, where)
        kind = as_word(source.get("type"), f"{where}.type")
        table = PARTS.get(kind)
        if table is None or kind not in ROLE_PARTS[role]:
            raise unsupported_content(f"{where}.type", "this type of content cannot be moderated here")
        admitted = admit(table, source, where, self.options, printed=True)
        extras: list[Part] = [Text(text) for text in admitted.extras.values()]
        if kind != "image_url":
            if kind not in admitted.texts:
                raise invalid(f"{where}.{kind}", "must be a string")
            return admitted.kept, [Text(admitted.texts[kind]), *extras]
        image = as_object(source.get("image_url"), f"{where}.image_url")
        inner = admit(IMAGE_URL, image, f"{where}.image_url", self.options, printed=True)
        uri = as_str(image.get("url"), f"{where}.image_url.url")
        if len(self.sites) >= self.limits.images:
            raise FieldError(RejectKind.TOO_MANY_IMAGES, where, f"more than {self.limits.images} images")
        self.sites.append(MediaSite(uri, ("messages", index, "content", number, "image_url", "url")))
        extras += [Text(text) for text in inner.extras.values()]
        kept = admitted.kept | {"image_url": in_order(image, inner.kept | {"url": uri})}
        return in_order(source, kept), [Uri(uri), *extras]

    def tool_calls(self, value: JSONValue, path: str) -> tuple[list[JSONValue], list[Part]]:
        kept: list[JSONValue] = []
        parts: list[Part] = []
        for number, item in enumerate(as_list(value, path, _TOOLS)):
            where = f"{path}[{number}]"
            source = as_object(item, where)
            kind = as_word(source.get("type", "function"), f"{where}.type")
            table = TOOL_CALLS.get(kind)
            if table is None:
                raise unsupported_content(f"{where}.type", "this type of tool call cannot be moderated")
            admitted = admit(table, source, where, self.options, printed=True)
            id = self.id(source.get("id"), f"{where}.id")
            inner, name, arguments, extra = read_named(
                CALL[kind], source.get(kind), f"{where}.{kind}", self.options, printed=True
            )
            kept.append(in_order(source, admitted.kept | {"id": id, kind: inner}))
            parts += [ToolCall(id, name, arguments), *extra, *(Text(text) for text in admitted.extras.values())]
        return kept, parts

    def id(self, value: JSONValue, path: str) -> str:
        # Nine letters and digits: Mistral's templates accept no other ids.
        return self.ids.setdefault(as_str(value, path), f"call{len(self.ids) + 1:05d}")


def _reasoning(admitted: Admitted) -> list[str]:
    found = (admitted.texts.get(name) for name in ("reasoning", "reasoning_content"))
    return list(dict.fromkeys(text for text in found if text is not None))
