"""The guardrail that LiteLLM loads: its hooks, each handing one request to the guard and back.

LiteLLM runs our own hooks and not its ``apply_guardrail`` (``use_native_lifecycle_hooks``), because that skips turns
without text, images of the Responses API and streams. All hooks run whatever ``mode`` says; ``mode`` chooses which
sources are judged. Every call type is refused that is neither an API of ``wire.ROUTES`` nor named in ``guard_unread``.

A request whose prompt was not seen before its answer comes (guardrails that LiteLLM merges late) is judged then,
before anything of the answer is released.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx
from fastapi import HTTPException
from litellm.exceptions import ModifyResponseException
from litellm.integrations.custom_guardrail import CustomGuardrail
from litellm.proxy._types import ProxyException
from litellm.types.guardrails import GuardrailEventHooks

from guard_integrations.litellm import mcp, passthrough, report, selftest, settings, wire
from guard_integrations.litellm.refusal import as_http, failed, not_served, refused
from guard_integrations.litellm.streams import Stream, StreamFailed
from guard_integrations.litellm.turn import Refused, Turn, caller_of
from guard_middleware.errors import UpstreamError

logger = logging.getLogger(__name__)

#: LiteLLM looks for these in the class itself and never in its bases
_LEAF_HOOKS = (
    "async_pre_call_hook",
    "async_post_call_response_headers_hook",
    "async_post_call_streaming_iterator_hook",
)
#: call types without content: lists of what is there
_NO_CONTENT = frozenset({"list_mcp_tools"})
_HOOKS = [
    GuardrailEventHooks.pre_call,
    GuardrailEventHooks.during_call,
    GuardrailEventHooks.post_call,
    GuardrailEventHooks.pre_mcp_call,
    GuardrailEventHooks.during_mcp_call,
    GuardrailEventHooks.post_mcp_call,
]

#: the turn of the request that this task serves; ``UNREAD`` where the operator lets it pass
_current: contextvars.ContextVar[Turn | str | None] = contextvars.ContextVar("guard_litellm_turn", default=None)
_UNREAD = "unread"


class GuardMiddlewareGuardrail(CustomGuardrail):  # type: ignore[misc]
    """Loaded by ``guardrail: guard_integrations.litellm.GuardMiddlewareGuardrail``; see docs/litellm.md.

    Raises ``RuntimeError`` for a configuration that must not start.
    """

    use_native_lifecycle_hooks = True
    records_own_guardrail_information = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        for name in _LEAF_HOOKS:
            if name not in cls.__dict__:
                setattr(cls, name, getattr(cls, name))
        if not cls.use_native_lifecycle_hooks:
            raise RuntimeError(f"{cls.__name__} turns use_native_lifecycle_hooks off, which would switch the guard off")
        super().__init_subclass__(**kwargs)

    def __init__(self, guardrail_name: str = "guard", event_hook: Any = None, **kwargs: Any) -> None:
        self.settings = settings.Settings.of(event_hook or ["pre_call", "post_call"], kwargs)
        self.runtime = settings.runtime(self.settings.config)
        self.report = report.Report(self, self.settings.config)
        #: how often LiteLLM called the first hook
        self.asked = 0
        try:
            super().__init__(guardrail_name=guardrail_name, event_hook=_HOOKS, **kwargs)
        except (TypeError, ValueError) as error:
            raise RuntimeError(f"guardrail {guardrail_name}: {error}") from error
        mcp.register(self)
        selftest.start(self)

    # -- before the call --

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: Any
    ) -> Any:
        """Judges the request and writes back what was judged."""
        self.asked += 1
        kind = str(getattr(call_type, "value", call_type))
        if kind == "call_mcp_tool":
            await mcp.judge_call(self, data, user_api_key_dict)
            return data
        route = self.route_of(kind, user_api_key_dict, data)
        if route is None:
            _current.set(_UNREAD)
            return data
        turn = await self._begin(route, user_api_key_dict, data)
        turn.relayed = kind == passthrough.CALL
        _current.set(turn)
        return data

    async def async_moderation_hook(self, data: dict[str, Any], user_api_key_dict: Any, call_type: Any) -> Any:
        """Beside the call: the race is the policy's and runs already; its verdict is waited for with the answer."""
        return None

    def route_of(self, kind: str, user_api_key_dict: Any, data: Mapping[str, Any]) -> wire.Route | None:
        """The API of a request, or None where the operator lets it pass unread; raises ``Refusal``."""
        if kind in self.settings.unread or kind in _NO_CONTENT:
            return None
        if kind == passthrough.CALL:
            return passthrough.route_of(self, user_api_key_dict, data)
        route = wire.by_call(kind)
        if route is None:
            raise not_served(self, kind)
        return route

    async def _begin(self, route: wire.Route, user_api_key_dict: Any, data: dict[str, Any]) -> Turn:
        caller = caller_of(user_api_key_dict, data)
        body = wire.request_value(route, data)
        turn = Turn(self.runtime, route, body, caller)
        try:
            judged = await turn.begin()
        except Refused as answer:
            _current.set(turn)  # its headers go with the refusal
            raise self._refusal(turn, answer, data) from None
        wire.apply_request(data, body, judged)
        return turn

    # -- after the call --

    async def async_post_call_success_hook(self, data: dict[str, Any], user_api_key_dict: Any, response: Any) -> Any:
        """Judges a whole answer; returns what may be released in its place."""
        turn = await self._turn(data, user_api_key_dict)
        if turn is None:
            return response
        value = wire.answer_value(response)
        try:
            released = await turn.whole(wire.answer_bytes(value))
        except Refused as answer:
            raise self._refusal(turn, answer, data) from None
        self.report.add(turn, data)
        try:
            return response if released == value else wire.rebuild(response, released)
        except ValueError as error:
            raise failed(self, error) from None

    async def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Any, response: Any, request_data: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        """Releases of a stream what the guard's policy releases."""
        turn = await self._turn(request_data, user_api_key_dict)
        if turn is None:
            async for item in response:
                yield item
            return
        stream = Stream(turn.route, response)
        try:
            async for item in stream.outgoing(await turn.streamed(stream.incoming())):
                yield item
        except Refused as answer:
            raise self._refusal(turn, answer, request_data) from None
        except (StreamFailed, UpstreamError, ValueError) as error:
            raise failed(self, error) from None
        finally:
            await turn.close()
            self.report.add(turn, request_data)

    async def async_post_call_failure_hook(
        self,
        request_data: dict[str, Any],
        original_exception: Exception,
        user_api_key_dict: Any,
        traceback_str: str | None = None,
    ) -> Any:
        """Ends the turn of a call that failed; what the upstream said of it, which nobody screened, is replaced."""
        turn = _current.get()
        if not isinstance(turn, Turn) or turn.relayed or turn.answered:
            return None
        answer = None
        if isinstance(original_exception, HTTPException | ProxyException | ModifyResponseException):
            # LiteLLM's own words (limits, unknown models), or those of another guardrail in place of an answer
            await turn.close()
            _current.set(_UNREAD)
        else:
            status = getattr(original_exception, "status_code", None)
            answer = await turn.upstream_failed(status if isinstance(status, int) else 502)
        self.report.add(turn, request_data)
        return None if answer is None else as_http(refused(self, turn, answer, request_data))

    async def async_post_call_response_headers_hook(
        self,
        data: dict[str, Any],
        user_api_key_dict: Any,
        response: Any,
        request_headers: Any = None,
        litellm_call_info: Any = None,
    ) -> dict[str, str] | None:
        """The decision's id and action; of a stream they are known too late for its head."""
        turn = _current.get()
        if not isinstance(turn, Turn):
            return None
        if isinstance(response, httpx.Response):
            await passthrough.guard_answer(self, turn, response, data)
        return {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in turn.headers
            if name.startswith(b"x-guard-")
        }

    # -- around a deployment, where LiteLLM binds guardrails to models; in the SDK these are the only hooks --

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: Any) -> Any:
        """Judges what no proxy has judged."""
        if _of_proxy(_current.get()):
            return kwargs
        result = await super().async_pre_call_deployment_hook(kwargs, call_type)
        if isinstance(turn := _current.get(), Turn):
            turn.deployed = True
        return result

    async def async_post_call_success_deployment_hook(
        self, request_data: dict[str, Any], response: Any, call_type: Any
    ) -> Any:
        """Judges what no proxy will judge."""
        if _of_proxy(_current.get()):
            return None
        return await super().async_post_call_success_deployment_hook(request_data, response, call_type)

    # -- inside --

    async def _turn(self, data: dict[str, Any], user_api_key_dict: Any) -> Turn | None:
        """The turn of this request, begun now where LiteLLM never showed the request; None for what passes unread."""
        turn = _current.get()
        if isinstance(turn, Turn):
            if turn.answered:  # a second answer to one request: nobody judged it
                raise failed(self, ValueError())
            return turn
        if turn == _UNREAD:
            return None
        kind = str(getattr(data.get("litellm_logging_obj"), "call_type", ""))
        route = self.route_of(kind, user_api_key_dict, data)
        return None if route is None else await self._begin(route, user_api_key_dict, dict(data))

    def _refusal(self, turn: Turn, answer: Refused, data: dict[str, Any]) -> Exception:
        self.report.add(turn, data)
        if answer.status == 200:  # LiteLLM makes an answer of our words, and shows it to the hooks
            _current.set(_UNREAD)
        return refused(self, turn, answer, data)


def _of_proxy(turn: Turn | str | None) -> bool:
    return turn == _UNREAD or (isinstance(turn, Turn) and not turn.deployed)
