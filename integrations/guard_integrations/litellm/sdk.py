"""The guard inside LiteLLM's SDK: ``install()`` puts every call of the four APIs through it, in place.

    import litellm
    from guard_integrations.litellm import install

    install(config="guard.yaml")
    litellm.completion(model="openai/gpt-5", messages=[...])     # judged, like acompletion, a Router's calls, streams

LiteLLM's callbacks see too little of the SDK: no synchronous call, no positional argument, no stream's text. So the
guard lies outside its functions: around caches, retries and fallbacks. What a guarded call does itself inside LiteLLM
(bridges between APIs, LiteLLM's own follow-up calls) belongs to it: its answer is what is judged.

Refuses: LiteLLM's other calls, unless ``unread`` names them; settings that bring a prompt past the guard.
"""

from __future__ import annotations

import atexit
import contextvars
import inspect
import os
import threading
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from types import FunctionType
from typing import Any, Final

from guard_integrations.litellm import sdk_errors, sdk_streams, settings, wire
from guard_integrations.litellm.calls import Call, Unreadable
from guard_integrations.litellm.inplace import Replaced, innermost
from guard_integrations.litellm.portal import Host, OnGuard, Portal, Steps
from guard_integrations.litellm.relay import Relay, Whole
from guard_middleware.config import Config
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.runtime import Runtime

#: releases of LiteLLM whose inside was read and tested: from the first, below the second
VERSIONS: Final = ((1, 102), (1, 104))


class _Inside:
    """A guarded call that is under way; LiteLLM's tasks may carry it beyond its end."""

    open = True


_inside: contextvars.ContextVar[_Inside | None] = contextvars.ContextVar("guard_litellm_inside", default=None)


class Guard:
    """One installation: its runtime lives on a loop of its own, and is made anew in a forked process."""

    def __init__(self, config: Config, unread: frozenset[str]) -> None:
        self.config, self.unread = config, unread
        self._lock = threading.Lock()
        self._pid = 0
        self._replaced: list[Replaced] = []
        self._start()

    def _start(self) -> None:
        self.portal, self._pid = Portal(), os.getpid()
        self.runtime = Runtime(self.config, remote=True)
        self.portal.call(self.runtime.start(wait=True))

    def here(self) -> None:
        """Threads and sockets do not survive a fork."""
        if self._pid != os.getpid():
            with self._lock:
                if self._pid != os.getpid():
                    self._start()

    def close(self) -> None:
        for replaced in self._replaced:
            replaced.restore()
        if self._pid == os.getpid():
            self.portal.call(self.runtime.aclose())
            self.portal.close()

    def replace(self, function: Any, route: wire.Route, signature: Callable[..., Any]) -> None:
        def handler(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            inside = _inside.get()
            if inside is not None and inside.open:
                return original(*args, **kwargs)
            self.here()
            steps = self.steps(route, original, signature, args, kwargs)
            asynchronous = inspect.iscoroutinefunction(original)
            return self.portal.arun(steps) if asynchronous else self.portal.run(steps)

        self._replaced.append(Replaced(function, handler))

    def refuse_others(self, function_setup: Any) -> None:
        """``function_setup`` is what every decorated call of LiteLLM's runs first, with its name and by position."""

        def handler(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            inside = _inside.get()
            if args and args[0] not in self.unread and not (inside is not None and inside.open):
                raise sdk_errors.unreadable(
                    f"litellm.{args[0]} is not read by the guard; install(unread=[{args[0]!r}]) lets it pass unread",
                    str(kwargs.get("model") or ""),
                )
            return original(*args, **kwargs)

        self._replaced.append(Replaced(function_setup, handler))

    def steps(
        self, route: wire.Route, original: Callable[..., Any], signature: Callable[..., Any], args: Any, kwargs: Any
    ) -> Steps[Any]:
        """A guarded call, for ``Portal.run`` or ``arun``."""
        try:
            call = Call.of(route, signature, args, kwargs)
            body = call.encode()
        except Unreadable as error:
            raise sdk_errors.unreadable(str(error), str(kwargs.get("model") or "")) from None
        relay = Relay(self.runtime, route.path, body)
        try:
            return (yield from self._exchange(call, original, relay))
        except UpstreamError as error:
            self.portal.start(relay.close())
            raise sdk_errors.broken(error, call.model) from None
        except BaseException:
            self.portal.start(relay.close())
            raise

    def _exchange(self, call: Call, original: Callable[..., Any], relay: Relay) -> Steps[Any]:
        sent = yield OnGuard(relay.begin())
        if isinstance(sent, Whole):
            return self._made(call, None, sent)
        given = call.with_judged(wire.decode(sent))
        inside = _Inside()
        token = _inside.set(inside)
        try:
            result = yield Host(lambda: original(**given))
        except Exception as error:
            status = getattr(error, "status_code", None)
            if isinstance(status, int) and 400 <= status <= 599:
                whole = yield OnGuard(relay.whole(status, b"{}"))
            else:
                whole = yield OnGuard(relay.failed(UpstreamError(UpstreamErrorKind.RESET)))
            guards = sdk_errors.of(whole, call.model)
            if isinstance(guards, sdk_errors.GuardBlocked):  # the verdict on the prompt came while the model was asked
                raise guards from None
            raise
        finally:
            inside.open = False
            _inside.reset(token)
        if sdk_streams.is_stream(result):
            relay.streams()
            return sdk_streams.guarded(result, sdk_streams.Pump(self.portal, relay, call.route, result, call.model))
        value = wire.answer_value(result)
        if not isinstance(value, dict):
            raise TypeError(f"litellm answered with a {type(result).__name__}, which the guard cannot read")
        whole = yield OnGuard(relay.whole(200, wire.encode(value)))
        yield OnGuard(relay.close())
        return self._made(call, result, whole)

    def _made(self, call: Call, result: Any, whole: Whole) -> Any:
        if whole.status != 200:
            raise sdk_errors.of(whole, call.model)
        value = wire.decode(whole.body)
        return wire.rebuild(result, value)


_lock = threading.Lock()
_installed: Guard | None = None


def install(config: Config | str | Path | None = None, *, unread: Iterable[str] = ()) -> None:
    """Puts LiteLLM's calls in this process through the guard, whatever names they were imported under.

    ``config`` is a ``Config``, the path of its file, or None for the file that ``GUARD_MIDDLEWARE_CONFIG`` names.
    ``unread`` names LiteLLM's other calls that may pass UNREAD, such as ``aembedding``. Returns when the guard can
    judge. The second installation with the same arguments does nothing.

    Raises ``RuntimeError`` where LiteLLM is absent or unknown, for a bad configuration and for a second one, and
    ``GuardError`` where the guard does not get ready.
    """
    global _installed
    chosen = config if isinstance(config, Config) else settings.load(config)
    names = frozenset([unread] if isinstance(unread, str) else unread)
    with _lock:
        if _installed is not None:
            if (_installed.config, _installed.unread) != (chosen, names):
                raise RuntimeError("the guard is installed with another configuration; call uninstall() first")
            return
        functions, function_setup = _functions()
        guard = Guard(chosen, names)
        for function, route, signature in functions:
            guard.replace(function, route, signature)
        guard.refuse_others(function_setup)
        _installed = guard
        _at_exit(uninstall)


def uninstall() -> None:
    """Takes the guard out again and ends its worker; without an installation it does nothing."""
    global _installed
    with _lock:
        guard, _installed = _installed, None
        if guard is not None:
            guard.close()


def _at_exit(work: Callable[[], None]) -> None:
    """Before the interpreter ends its thread pools, which ``atexit`` comes after and closing needs."""
    getattr(threading, "_register_atexit", atexit.register)(work)


def _functions() -> tuple[list[tuple[Any, wire.Route, Callable[..., Any]]], Any]:
    """LiteLLM's functions with their API and the function whose signature names their arguments."""
    _check_version()
    import litellm
    from litellm import utils
    from litellm.llms.anthropic.experimental_pass_through.messages import handler

    found: list[tuple[Any, wire.Route, Callable[..., Any]]] = []
    try:
        for route, names in {
            wire.CHAT: ("completion", "acompletion"),
            wire.COMPLETIONS: ("text_completion", "atext_completion"),
            wire.RESPONSES: ("responses", "aresponses"),
            wire.MESSAGES: ("anthropic_messages",),
        }.items():
            for name in names:
                function = innermost(getattr(litellm, name), utils.client)
                named = litellm.text_completion if name == "atext_completion" else getattr(litellm, name)
                found.append((function, route, inspect.unwrap(named)))
        plain = handler.anthropic_messages_handler  # behind ``litellm.anthropic.messages.create``
        signature = FunctionType(plain.__code__, plain.__globals__, plain.__name__, plain.__defaults__)
        return [*found, (plain, wire.MESSAGES, signature)], utils.function_setup
    except (AttributeError, LookupError) as missing:
        raise RuntimeError(
            f"litellm has no {missing} of the kind that the guard knows; another library may have replaced it: "
            "install the guard first"
        ) from None


def _check_version() -> None:
    first, beyond = VERSIONS
    wanted = f"litellm>={first[0]}.{first[1]},<{beyond[0]}.{beyond[1]}"
    try:
        version = metadata.version("litellm")
    except metadata.PackageNotFoundError:
        raise RuntimeError(f"litellm is not installed: pip install '{wanted}'") from None
    if not first <= tuple(int(part) for part in version.split(".")[:2]) < beyond:
        raise RuntimeError(f"litellm {version} is unknown to this guard: pip install '{wanted}'")
