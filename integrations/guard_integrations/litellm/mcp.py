"""Tool calls and results of LiteLLM's MCP gateway, judged as what they are to a model: a call, and what it returned.

Calls come to our own hook. LiteLLM shows results only to guardrails that have ``apply_guardrail`` in their class and
no hooks of their own, so a second guardrail of the same name, ``McpResults``, takes those.
"""

from __future__ import annotations

from typing import Any

import litellm
import orjson
from litellm.integrations.custom_guardrail import CustomGuardrail
from litellm.types.guardrails import GuardrailEventHooks

from guard_integrations.litellm import wire
from guard_integrations.litellm.refusal import as_http, refused
from guard_integrations.litellm.turn import Caller, Refused, Turn

#: an answer that says nothing: a call and its result are judged, and no model answers them here
_NOTHING = {
    "id": "mcp",
    "object": "chat.completion",
    "created": 0,
    "model": "mcp",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": None}, "finish_reason": "stop"}],
}


def register(guardrail: Any) -> None:
    """Adds the guardrail that judges tool results."""
    litellm.logging_callback_manager.add_litellm_callback(McpResults(guardrail))


async def judge_call(guardrail: Any, data: dict[str, Any], caller: Caller) -> None:
    """Judges a tool call before it is made; raises what refuses it."""
    name = str(data.get("mcp_tool_name") or "tool")
    arguments = orjson.dumps(data.get("mcp_arguments") or {}).decode()
    await _judge(guardrail, [_call(name, arguments)], data, caller)


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

    async def apply_guardrail(
        self, inputs: Any, request_data: dict[str, Any], input_type: str, logging_obj: Any = None
    ) -> Any:
        """``inputs["texts"]`` are the texts of a tool's result; raises what refuses it."""
        text = "\n".join(inputs.get("texts") or [])
        messages = [_call("tool", "{}"), {"role": "tool", "tool_call_id": "mcp", "content": text}]
        await _judge(self._guardrail, messages, request_data, Caller())
        return inputs


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "mcp", "type": "function", "function": function}],
    }


async def _judge(guardrail: Any, messages: list[dict[str, Any]], data: dict[str, Any], caller: Caller) -> None:
    turn = Turn(guardrail.runtime, wire.CHAT, {"model": "mcp", "messages": messages}, caller)
    try:
        await turn.begin()
        await turn.whole(orjson.dumps(_NOTHING))
    except Refused as answer:
        guardrail.report.add(turn, data)
        raise as_http(refused(guardrail, turn, answer, data)) from None
    guardrail.report.add(turn, data)
