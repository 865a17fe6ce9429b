"""A Messages request, read into a Conversation and a body that holds nothing else.

Everything that can reach the model is moderated: the system prompt, every block of every message, results of tools
with their documents and images, tool definitions, output schemas, stop sequences, forced tools, and the names of
unknown fields in them. ``messages_fields`` has every field. Results of tools become messages of the role ``tool``,
so that a conversation reads as it would in any other dialect.

Ids of calls are the one thing that chat templates show the model and no guard reads, so they are renamed in the order
in which they appear (``call00001``; ``srvtoolu_00001`` for calls that the service ran). The same history is renamed
alike in every turn, so that prompt caches and the binding of thinking blocks to what stands before them hold. A
request that continues a thread names calls of an answer that the service holds: their ids stay, if they look like ids.

Refuses:
- unknown roles, block types, tool types, and fields that can carry content; blocks where they do not belong;
- files, PDFs, containers, MCP servers, server-run tools that read what the guard cannot;
- server-side compaction and context editing: the model would read something else than the guard;
- more images than the limit, values of the wrong type.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from itertools import groupby

from guard_middleware.dialects.base import MediaSite, Options, ParsedRequest
from guard_middleware.dialects.fields import (
    FieldError,
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
from guard_middleware.dialects.messages_blocks import BlockReader, Path
from guard_middleware.dialects.messages_fields import (
    METADATA,
    OUTPUT_CONFIG,
    REQUEST,
    ROLES,
    SERVER_TOOLS,
    THREAD,
    TOOL_CHOICE,
    TOOLS,
)
from guard_middleware.dialects.request_shared import rejecting, unusual
from guard_middleware.errors import RejectKind
from guard_middleware.limits import Limits
from guard_middleware.strictjson import JSONValue
from guard_middleware.types import Blob, Conversation, Definition, Message, Part, Role, Text

_MESSAGES = 4096
_TOOLS = 512
_STOPS = 128
_SERVER_ID = "srvtoolu_"
_MACHINE_ID = re.compile(r"[A-Za-z]{1,16}[_-][A-Za-z0-9]{1,64}")


def parse_request(body: JSONValue, limits: Limits, options: Options) -> ParsedRequest:
    """Read a request body; raises ``RequestRejected`` and nothing else."""
    return rejecting(lambda: _Reader(limits, options).request(body))


def place(blob: Blob) -> JSONValue:
    """The source of an image block that holds these bytes."""
    return {"type": "base64", "media_type": blob.mime_type, "data": base64.b64encode(blob.data).decode("ascii")}


@dataclass(slots=True)
class _Reader:
    limits: Limits
    options: Options
    sites: list[MediaSite] = field(default_factory=list)
    ids: dict[str, str] = field(default_factory=dict)
    continues: str | None = None
    blocks: BlockReader = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = BlockReader(self.options, printed=True, id=self.id, image=self.image)

    def request(self, body: JSONValue) -> ParsedRequest:
        source = as_object(body, "")
        refuse_guards(source.keys() - REQUEST.keys() - self.options.extra_fields.keys())
        admitted = admit(REQUEST, source, "", self.options)
        kept = admitted.kept
        definitions: list[Definition] = []
        if (thread := source.get("thread")) is not None:
            kept["thread"], definitions = self.thread(thread)
        server_tools = self.continues is not None  # the thread may have such tools; nothing here says so
        if (tools := source.get("tools")) is not None:
            kept["tools"], found, runs = self.tools(tools)
            definitions += found
            server_tools = server_tools or runs
        for name, read in (("tool_choice", self.tool_choice), ("output_config", self.output_config)):
            if (value := source.get(name)) is not None:
                kept[name], found = read(value)
                definitions += found
        definitions += [Definition(name, text) for name, text in (admitted.texts | admitted.extras).items()]
        if (stops := source.get("stop_sequences")) is not None:
            kept["stop_sequences"] = stops
            for number, item in enumerate(as_list(stops, "stop_sequences", _STOPS)):
                definitions.append(Definition("stop", as_str(item, f"stop_sequences[{number}]")))
        if (metadata := source.get("metadata")) is not None:
            refuse_guards(as_object(metadata, "metadata"), "metadata")
            labels = admit(METADATA, metadata, "metadata", self.options)
            kept["metadata"] = dict(labels.kept)
            definitions += [Definition("metadata", text) for text in labels.extras.values()]

        messages: list[Message] = []
        if (system := source.get("system")) is not None:
            kept["system"], parts = self.blocks.content(system, "system", "system", ("system",))
            messages.append(Message("system", tuple(parts)))
        kept["messages"], said = self.messages(source.get("messages"))
        if "stream" in source:
            kept["stream"] = source["stream"]
        model = kept.get("model")
        return ParsedRequest(
            dialect="messages",
            conversation=Conversation((*messages, *said), tuple(definitions)),
            body=in_order(source, kept),
            model=model if isinstance(model, str) else None,
            stream=as_flag(source.get("stream"), "stream"),
            choices=1,
            include_usage=True,
            sites=tuple(self.sites),
            place=place,
            continues=self.continues,
            server_tools=server_tools,
        )

    def thread(self, value: JSONValue) -> tuple[dict[str, JSONValue], list[Definition]]:
        """A thread that is begun, or continued after the answer that it names."""
        admitted = admit(THREAD, value, "thread", self.options)
        kept = admitted.kept
        kept["type"] = kind = as_word(as_object(value, "thread").get("type"), "thread.type")
        if kind not in ("create", "continue"):
            raise unsupported_field("thread.type", "cannot be moderated")
        if kind == "continue":
            self.continues = as_identifier(kept.get("previous_message_id"), "thread.previous_message_id")
        return kept, [Definition("thread", text) for text in admitted.extras.values()]

    def tools(self, value: JSONValue) -> tuple[list[JSONValue], list[Definition], bool]:
        """(what is kept, what the guard reads, whether the service runs one of them)."""
        kept: list[JSONValue] = []
        definitions: list[Definition] = []
        server = False
        for index, item in enumerate(as_list(value, "tools", _TOOLS)):
            where = f"tools[{index}]"
            source = as_object(item, where)
            kind = as_word("custom" if source.get("type") is None else source["type"], f"{where}.type")
            table = TOOLS.get(kind)
            if table is None:
                raise unsupported_content(f"{where}.type", "this type of tool cannot be moderated")
            server = server or kind in SERVER_TOOLS
            admitted = admit(table, source, where, self.options, printed=True)
            if "name" in table:
                as_str(source.get("name"), f"{where}.name")
            definitions.append(Definition("tool", json_text({name: source[name] for name in admitted.texts})))
            definitions += [Definition("tool", text) for text in admitted.extras.values()]
            kept.append(admitted.kept)
        return kept, definitions, server

    def tool_choice(self, value: JSONValue) -> tuple[JSONValue, list[Definition]]:
        admitted = admit(TOOL_CHOICE, value, "tool_choice", self.options, printed=True)
        said = [] if admitted.kept.get("type") == "tool" else unusual(TOOL_CHOICE, admitted.kept, "tool_choice")
        texts = [*admitted.texts.values(), *admitted.extras.values()]
        return admitted.kept, [*said, *(Definition("tool_choice", text) for text in texts)]

    def output_config(self, value: JSONValue) -> tuple[JSONValue, list[Definition]]:
        admitted = admit(OUTPUT_CONFIG, value, "output_config", self.options, printed=True)
        said = unusual(OUTPUT_CONFIG, admitted.kept, "output_config")
        texts = [*admitted.texts.values(), *admitted.extras.values()]
        return admitted.kept, [*said, *(Definition("output_config", text) for text in texts)]

    def messages(self, value: JSONValue) -> tuple[list[JSONValue], list[Message]]:
        kept: list[JSONValue] = []
        messages: list[Message] = []
        items = as_list(value, "messages", _MESSAGES)
        if not items:
            raise invalid("messages", "must not be empty")
        for index, item in enumerate(items):
            where = f"messages[{index}]"
            source = as_object(item, where)
            role = as_word(source.get("role"), f"{where}.role")
            if role not in ROLES:
                raise unsupported_content(f"{where}.role", "is not a role of this API")
            admitted = admit(ROLES[role], source, where, self.options, printed=True)
            admitted.kept["content"], said = self.said(source.get("content"), role, index)
            extras: list[Part] = [Text(text) for text in admitted.extras.values()]
            kept.append(in_order(source, admitted.kept))
            messages += [*said, *([Message(_ROLE[role], tuple(extras))] if extras else [])]
        return kept, messages

    def said(self, value: JSONValue, role: str, index: int) -> tuple[JSONValue, list[Message]]:
        """A message's content. In the neutral form, what tools answered in it is said by ``tool``."""
        where, path = f"messages[{index}].content", ("messages", index, "content")
        if isinstance(value, str):
            return value, [Message(_ROLE[role], (Text(value),))]
        found = list(self.blocks.each(value, role, where, path))
        runs = groupby(found, lambda block: "tool" if block[0]["type"] == "tool_result" else _ROLE[role])
        messages = [Message(said_by, tuple(part for _, parts in run for part in parts)) for said_by, run in runs]
        return [sent for sent, _ in found], messages or [Message(_ROLE[role], ())]

    def image(self, uri: str, where: str, path: Path) -> None:
        if len(self.sites) >= self.limits.images:
            raise FieldError(RejectKind.TOO_MANY_IMAGES, where, f"more than {self.limits.images} images")
        self.sites.append(MediaSite(uri, path))

    def id(self, value: JSONValue, path: str) -> str:
        said = as_str(value, path)
        if self.continues is not None:
            if not _MACHINE_ID.fullmatch(said):
                raise invalid(path, "must be the id of a call")
            return said
        # Nine letters and digits: Mistral's templates accept no other ids. The service wants its own prefix back.
        new = f"{_SERVER_ID if said.startswith(_SERVER_ID) else 'call'}{len(self.ids) + 1:05d}"
        return self.ids.setdefault(said, new)


_ROLE: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system"}
