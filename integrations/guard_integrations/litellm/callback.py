"""The guard as a callback of LiteLLM's SDK: what its hooks reach, for programs that want nothing replaced.

    litellm.callbacks = [GuardCallback("guard.yaml")]

LiteLLM calls the hooks of asynchronous calls only, never for a stream's text nor with positional arguments: see the
table in docs/litellm-sdk.md. ``install()`` covers all of them; where both are there, ``install()`` judges.

Refuses: a call whose prompt LiteLLM does not show its hooks.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from litellm.integrations.custom_logger import CustomLogger

from guard_integrations.litellm import sdk, sdk_errors, settings, wire
from guard_integrations.litellm.calls import Call, Unreadable
from guard_integrations.litellm.relay import Relay, Whole
from guard_integrations.litellm.sdk_guard import Guard, answer_bytes, made
from guard_middleware.config import Config
from guard_middleware.errors import UpstreamError, UpstreamErrorKind

_NAMED = inspect.signature(lambda **arguments: None)
#: the field without which LiteLLM was given its prompt by position
_PROMPT = {wire.CHAT: "messages", wire.COMPLETIONS: "prompt", wire.MESSAGES: "messages", wire.RESPONSES: "input"}
#: calls whose answers are awaited; beyond them the oldest is recorded as dropped, and its answer refused
_OPEN = 1000


class GuardCallback(CustomLogger):  # type: ignore[misc]
    """``config`` as for ``install()``; raises what that raises."""

    def __init__(self, config: Config | str | Path | None = None) -> None:
        super().__init__()
        self._guard = Guard(config if isinstance(config, Config) else settings.load(config))
        self._open: dict[str, tuple[Call, Relay]] = {}

    def close(self) -> None:
        """Ends the worker and writes what the log still holds."""
        self._guard.close()

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: Any) -> dict[str, Any] | None:
        """Judges the prompt; what is called is what was judged."""
        route = wire.by_call(call_type)
        if route is None or sdk.inside():
            return None
        try:
            if _PROMPT[route] not in kwargs:
                raise Unreadable(f"LiteLLM's callbacks do not see positional arguments: pass {_PROMPT[route]} by name")
            call = Call.of(route, _NAMED, (), kwargs)
        except Unreadable as error:
            raise sdk_errors.unreadable(str(error), str(kwargs.get("model") or "")) from None
        relay = self._guard.relay(call)
        sent = await self._guard.loop.acall(relay.begin())
        if isinstance(sent, Whole):
            self._guard.loop.begin(relay.close())
            raise sdk_errors.of(sent, call.model)
        self._keep(kwargs.get("litellm_call_id"), call, relay)
        return call.with_judged(wire.decode(sent))

    async def async_post_call_success_deployment_hook(
        self, request_data: dict[str, Any], response: Any, call_type: Any
    ) -> Any:
        """Judges a whole answer; returns what of it is released."""
        if wire.by_call(call_type) is None or sdk.inside():
            return None
        if (found := self._open.pop(str(request_data.get("litellm_call_id")), None)) is None:
            raise sdk_errors.forgotten(str(request_data.get("model") or ""))
        call, relay = found
        try:
            whole = await self._guard.loop.acall(relay.whole(200, answer_bytes(response)))
        except UpstreamError as error:
            raise sdk_errors.broken(error, call.model) from None
        finally:
            self._guard.loop.begin(relay.close())
        return made(call, response, whole)

    async def async_post_call_failure_deployment_hook(
        self, request_data: Any, exception: Exception, call_type: Any, **_: Any
    ) -> None:
        """Ends the exchange of a call that failed."""
        if (found := self._open.pop(str(request_data.get("litellm_call_id")), None)) is not None:
            relay = found[1]
            await self._guard.loop.acall(relay.failed(UpstreamError(UpstreamErrorKind.RESET)))
            self._guard.loop.begin(relay.close())

    def _keep(self, id: Any, call: Call, relay: Relay) -> None:
        """Until the answer comes; of a stream no hook shows it, nor tells of a call that was cancelled."""
        self._open[str(id)] = call, relay
        forgotten = [str(id)] if call.streams else list(self._open)[:-_OPEN]
        for one in forgotten:
            self._guard.loop.begin(self._open.pop(one)[1].close())
