"""The guard of a process that calls LiteLLM's SDK: its runtime on a loop of its own, and one call through it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from guard_integrations.litellm import sdk_errors, sdk_streams, wire
from guard_integrations.litellm.calls import Call
from guard_integrations.litellm.relay import Relay, Whole
from guard_integrations.litellm.steps import GuardLoop, Host, OnGuard, Steps
from guard_middleware.config import Config
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.runtime import Runtime


class Guard:
    """Ready to judge when it is made; raises ``ConfigError`` and ``GuardError``."""

    def __init__(self, config: Config, tenant: str | None = None) -> None:
        self._config, self._tenant = config, tenant
        self._lock = threading.Lock()
        self._start()

    def close(self) -> None:
        """Ends the worker and writes what the log still holds."""
        self._loop.close()

    @property
    def loop(self) -> GuardLoop:
        """Made anew in a forked process: threads and connections do not come with it."""
        if self._pid != os.getpid():
            with self._lock:
                if self._pid != os.getpid():
                    self._start()
        return self._loop

    def steps(self, call: Call, original: Callable[[dict[str, Any]], Any]) -> Steps[Any]:
        """A guarded call, for ``GuardLoop.run`` or ``arun``; ``original`` takes the judged arguments."""
        relay = self.relay(call)
        try:
            return (yield from self._exchange(call, original, relay))
        except UpstreamError as error:
            self.loop.begin(relay.close())
            raise sdk_errors.broken(error, call.model) from None
        except BaseException:
            self.loop.begin(relay.close())
            raise

    def relay(self, call: Call) -> Relay:
        return Relay(self._runtime, call.route.path, call.body, self._tenant)

    def _start(self) -> None:
        runtime = Runtime(self._config, remote=True)
        loop = GuardLoop(runtime.aclose)
        try:
            loop.call(runtime.start(wait=True))
        except BaseException:
            loop.close()
            raise
        self._runtime, self._loop, self._pid = runtime, loop, os.getpid()

    def _exchange(self, call: Call, original: Callable[[dict[str, Any]], Any], relay: Relay) -> Steps[Any]:
        sent = yield OnGuard(relay.begin())
        if isinstance(sent, Whole):
            yield OnGuard(relay.close())
            return self._refusal(call, relay, sent)
        given = call.with_judged(wire.decode(sent))
        try:
            result = yield Host(lambda: original(given))
        except Exception as error:
            status = getattr(error, "status_code", None)
            if isinstance(status, int) and 400 <= status <= 599:
                whole = yield OnGuard(relay.whole(status, b"{}"))
            else:
                whole = yield OnGuard(relay.failed(UpstreamError(UpstreamErrorKind.RESET)))
            if sdk_errors.is_block(whole):  # the verdict on the prompt came while the model was asked
                raise sdk_errors.of(whole, call.model) from None
            raise
        if sdk_streams.is_stream(result):
            yield OnGuard(relay.streams())
            return sdk_streams.guarded(result, sdk_streams.Pump(self.loop, relay, call, result))
        whole = yield OnGuard(relay.whole(200, answer_bytes(result)))
        yield OnGuard(relay.close())
        return made(call, result, whole)

    def _refusal(self, call: Call, relay: Relay, whole: Whole) -> Any:
        if whole.status == 200 and call.streams:
            return sdk_streams.refusing(call, sdk_streams.Pump.of(self.loop, relay, call, whole.body))
        return made(call, _empty(call.route), whole)


def answer_bytes(result: Any) -> bytes:
    """A whole answer of LiteLLM's as JSON."""
    value = wire.answer_value(result)
    if not isinstance(value, dict):
        raise TypeError(f"LiteLLM answered with a {type(result).__name__}, which the guard cannot read")
    return wire.answer_bytes(value)


def made(call: Call, result: Any, whole: Whole) -> Any:
    """What the caller gets in place of ``result``."""
    if whole.status != 200:
        raise sdk_errors.of(whole, call.model)
    return wire.rebuild(result, wire.decode(whole.body))


def _empty(route: wire.Route) -> Any:
    """An answer of the kind that LiteLLM gives."""
    from litellm.types.llms.openai import ResponsesAPIResponse
    from litellm.types.utils import ModelResponse, TextCompletionResponse

    kinds = {wire.CHAT: ModelResponse, wire.COMPLETIONS: TextCompletionResponse}
    if route is wire.RESPONSES:
        return ResponsesAPIResponse.model_construct()
    return kinds[route]() if route in kinds else {}
