"""Tool calls and results of LiteLLM's MCP gateway, judged as what they are to a model: a call, and what it returned.

Calls come to our own hook. LiteLLM shows results only to guardrails that have ``apply_guardrail`` in their class and
no hooks of their own, so a second guardrail of the same name, ``McpResults``, takes those. Of a result LiteLLM would
show it the text alone, and not who asks: ``register`` lays over LiteLLM's handler one that hands it the whole.

Refuses: sounds and bytes in a result, which the guard cannot judge.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import litellm
import orjson
from litellm.integrations.custom_guardrail import CustomGuardrail
from litellm.llms import load_guardrail_translation_mappings
from litellm.types.guardrails import GuardrailEventHooks
from litellm.types.utils import CallTypes

from guard_integrations.litellm import wire
from guard_integrations.litellm.refusal import as_http, not_served, refused
from guard_integrations.litellm.turn import Refused, Turn, caller_of

#: an answer that says nothing: a call and its result are judged, and no model answers them here
_NOTHING = {
    "id": "mcp",
    "object": "chat.completion",
    "created": 0,
    "model": "mcp",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": None}, "finish_reason": "stop"}],
}


def register(guardrail: Any) -> None:
    """Adds the guardrail that judges tool results. Without the ``mcp`` package LiteLLM has no handler and no tools."""
    litellm.logging_callback_manager.add_litellm_callback(McpResults(guardrail))
    handlers = load_guardrail_translation_mappings()
    handler = handlers.get(CallTypes.call_mcp_tool)
    if handler is not None and not hasattr(handler, "shows_whole_results"):
        handlers[CallTypes.call_mcp_tool] = _showing_whole_results(handler)


async def judge_call(guardrail: Any, data: dict[str, Any], user_api_key_dict: Any) -> None:
    """Judges a tool call before it is made; raises what refuses it."""
    name = str(data.get("mcp_tool_name") or "tool")
    arguments = orjson.dumps(data.get("mcp_arguments") or {}).decode()
    await _judge(guardrail, [_call(name, arguments)], data, user_api_key_dict)


class McpResults(CustomGuardrail):  # type: ignore[misc]
    """Judges what a tool returned before the client or a model gets it."""

    records_own_guardrail_information = True

    def __init__(self, guardrail: Any) -> None:
        self._guardrail = guardrail
        super().__init__(
            guardrail_name=guardrail.guardrail_name,
            event_hook=[GuardrailEventHooks.post_mcp_call],
            default_on=guardrail.default_on,
        )

    async def judge(self, result: Any, request_data: dict[str, Any], user_api_key_dict: Any) -> None:
        """Leaves in ``result`` the pictures as they were judged; raises what refuses it."""
        if not (parts := list(_parts(result.model_dump(mode="json", by_alias=True, exclude_none=True)))):
            return
        messages = [_call("tool", "{}"), {"role": "tool", "tool_call_id": "mcp", "content": parts}]
        judged = await _judge(self._guardrail, messages, request_data, user_api_key_dict)
        _put_back(result, judged["messages"][1]["content"])

    async def apply_guardrail(
        self, inputs: Any, request_data: dict[str, Any], input_type: str, logging_obj: Any = None
    ) -> Any:
        """What LiteLLM looks for; it is called where our handler is not, and then nobody sees the whole result."""
        raise as_http(not_served(self._guardrail, "MCP"))


def _showing_whole_results(handler: Any) -> Any:
    class Handler(handler):  # type: ignore[misc]
        shows_whole_results = True

        async def process_output_response(
            self,
            response: Any,
            guardrail_to_apply: Any,
            litellm_logging_obj: Any = None,
            user_api_key_dict: Any = None,
            request_data: Any = None,
        ) -> Any:
            if not isinstance(guardrail_to_apply, McpResults):
                return await super().process_output_response(
                    response, guardrail_to_apply, litellm_logging_obj, user_api_key_dict, request_data
                )
            await guardrail_to_apply.judge(response, {} if request_data is None else request_data, user_api_key_dict)
            return response

    return Handler


def _parts(result: Any) -> Iterator[dict[str, Any]]:
    """A result as parts of a tool's message: texts, pictures, and all its other fields as JSON.

    What nobody can judge becomes a part that the dialect refuses.
    """
    for item in result["content"]:
        kind, rest = item["type"], dict(item)
        if kind == "text":
            yield {"type": "text", "text": rest.pop("text")}
        elif kind == "image":
            url = f"data:{rest.pop('mimeType')};base64,{rest.pop('data')}"
            yield {"type": "image_url", "image_url": {"url": url}}
        elif kind not in ("resource", "resource_link") or "blob" in rest.get("resource", ()):
            yield {"type": f"mcp_{kind}"}
            return
        if len(rest) > 1:
            yield _json(rest)
    flags = (True, False, "complete")  # ``isError``, and the ``resultType`` of every whole result
    if rest := {name: value for name, value in result.items() if name != "content" and value not in flags}:
        yield _json(rest)


def _json(value: Any) -> dict[str, Any]:
    return {"type": "text", "text": orjson.dumps(value).decode()}


def _put_back(result: Any, judged: list[dict[str, Any]]) -> None:
    """LiteLLM's log has the same object already, so it is changed and not copied."""
    urls = (part["image_url"]["url"] for part in judged if part["type"] == "image_url")
    for item in result.content:
        if item.type == "image":
            head, _, item.data = next(urls).partition(",")
            kind = "mimeType" if hasattr(item, "mimeType") else "mime_type"  # of mcp 1 and 2
            setattr(item, kind, head.removeprefix("data:").removesuffix(";base64"))


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "mcp", "type": "function", "function": function}],
    }


async def _judge(
    guardrail: Any, messages: list[dict[str, Any]], data: dict[str, Any], user_api_key_dict: Any
) -> dict[str, Any]:
    """The body as it was judged. A tool call has no model: key and team select its policy."""
    turn = Turn(guardrail.runtime, wire.CHAT, {"model": "mcp", "messages": messages}, caller_of(user_api_key_dict, {}))
    try:
        judged = await turn.begin()
        await turn.whole(orjson.dumps(_NOTHING))
    except Refused as answer:
        guardrail.report.add(turn, data)
        raise as_http(refused(guardrail, turn, answer, data)) from None
    guardrail.report.add(turn, data)
    return judged
