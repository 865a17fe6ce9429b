"""The guard inside LiteLLM's SDK: ``install()`` puts every call of the four APIs through it, in place.

    import litellm
    from guard_integrations.litellm import install

    install(config="guard.yaml")
    litellm.completion(model="openai/gpt-5", messages=[...])     # judged, like acompletion, a Router's calls, streams

LiteLLM's callbacks see too little of the SDK (docs/litellm-sdk.md), so the guard lies around its functions: outside
their caches, retries and fallbacks. What a guarded call does itself inside LiteLLM (bridges between APIs, follow-up
calls) belongs to it: its prompt and its answer are what is judged.

Refuses: LiteLLM's other calls, unless ``unread`` names them; settings that bring a prompt past the guard.
"""

from __future__ import annotations

import contextvars
import inspect
import threading
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from types import FunctionType
from typing import Any, Final

from guard_integrations.litellm import sdk_errors, settings, wire
from guard_integrations.litellm.calls import Call, Unreadable
from guard_integrations.litellm.inplace import Replaced, innermost
from guard_integrations.litellm.sdk_guard import Guard
from guard_middleware.config import Config

#: releases of LiteLLM whose inside was read and tested: from the first, below the second
VERSIONS: Final = ((1, 102), (1, 110))
_CALLS: Final = {
    wire.CHAT: ("completion", "acompletion"),
    wire.COMPLETIONS: ("text_completion", "atext_completion"),
    wire.RESPONSES: ("responses", "aresponses"),
    wire.MESSAGES: ("anthropic_messages",),
}


class _Inside:
    """A guarded call that is under way; LiteLLM's background tasks may carry it beyond its end."""

    open = True


_inside: contextvars.ContextVar[_Inside | None] = contextvars.ContextVar("guard_litellm_inside", default=None)
_lock = threading.Lock()
_installed: Installation | None = None


def install(
    config: Config | str | Path | None = None, *, unread: Iterable[str] = (), tenant: str | None = None
) -> None:
    """Puts LiteLLM's calls in this process through the guard, whatever names they were imported under.

    ``config`` is a ``Config``, the path of its file, or None for the file that ``GUARD_MIDDLEWARE_CONFIG`` names.
    ``unread`` names LiteLLM's other calls that may pass UNREAD, such as ``aembedding``. ``tenant`` chooses this
    process's policy where ``tenants.header`` is set. Returns when the guard can judge. A second installation with the
    same arguments does nothing.

    Raises ``RuntimeError`` where LiteLLM is absent or unknown, for a bad configuration and for a second one,
    ``ConfigError`` for one that this machine cannot run, and ``GuardError`` where the guard does not get ready.
    """
    global _installed
    chosen = config if isinstance(config, Config) else settings.load(config)
    asked = (chosen, frozenset([unread] if isinstance(unread, str) else unread), tenant)
    with _lock:
        if _installed is not None and _installed.asked != asked:
            raise RuntimeError("the guard is installed with other arguments; call uninstall() first")
        if _installed is None:
            _check_version()
            _installed = Installation(*asked)


def uninstall() -> None:
    """Takes the guard out again and ends its worker; without an installation it does nothing."""
    global _installed
    with _lock:
        if _installed is not None:
            _installed.remove()
            _installed = None


def inside() -> bool:
    """Whether this is LiteLLM at work for a call that is guarded already."""
    outer = _inside.get()
    return outer is not None and outer.open


class Installation:
    """LiteLLM's functions, replaced."""

    def __init__(self, config: Config, unread: frozenset[str], tenant: str | None) -> None:
        self.asked = (config, unread, tenant)
        functions = _functions()
        self._unread = unread
        self._guard = Guard(config, tenant)
        self._replaced = [Replaced(function, self._guarding(route, named)) for function, route, named in functions]
        from litellm import utils

        self._replaced.append(Replaced(utils.function_setup, self._refusing))

    def remove(self) -> None:
        for replaced in self._replaced:
            replaced.restore()
        self._guard.close()

    def _guarding(self, route: wire.Route, named: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(named)

        def handler(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if inside():
                return original(*args, **kwargs)
            try:
                call = Call.of(route, signature, args, kwargs)
            except Unreadable as error:
                raise sdk_errors.unreadable(str(error), str(kwargs.get("model") or "")) from None
            steps = self._guard.steps(call, lambda given: _within(original, given))
            asynchronous = inspect.iscoroutinefunction(original)
            return self._guard.loop.arun(steps) if asynchronous else self._guard.loop.run(steps)

        return handler

    def _refusing(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Of ``function_setup``, which each of LiteLLM's decorated calls runs first, its own name by position."""
        if args and args[0] not in self._unread and not inside():
            raise sdk_errors.unreadable(
                f"litellm.{args[0]} is not read by the guard; install(unread=[{args[0]!r}]) lets it pass unread",
                str(kwargs.get("model") or ""),
            )
        return original(*args, **kwargs)


def _within(original: Callable[..., Any], given: dict[str, Any]) -> Any:
    """LiteLLM's own call, whose inner calls are part of it."""
    call = _Inside()
    token = _inside.set(call)

    def ended() -> None:
        call.open = False
        _inside.reset(token)

    async def awaited(result: Any) -> Any:
        try:
            return await result
        finally:
            ended()

    try:
        result = original(**given)
    except BaseException:
        ended()
        raise
    if inspect.iscoroutinefunction(original):
        return awaited(result)
    ended()
    return result


def _functions() -> list[tuple[FunctionType, wire.Route, Callable[..., Any]]]:
    """Each function that is replaced with its API and the function whose signature names its arguments."""
    import litellm
    from litellm.utils import client

    found: list[tuple[FunctionType, wire.Route, Callable[..., Any]]] = []
    for route, names in _CALLS.items():
        for name in names:
            # ``atext_completion`` takes whatever ``text_completion`` takes
            named = getattr(litellm, name.removeprefix("a") if name == "atext_completion" else name)
            try:
                found.append((innermost(getattr(litellm, name), client), route, named))
            except LookupError:
                raise RuntimeError(
                    f"litellm.{name} is not LiteLLM's own: another library has replaced it; install the guard first"
                ) from None
    create = litellm.anthropic.messages.create  # the one call that LiteLLM does not decorate
    return [*found, (create, wire.MESSAGES, create)]


def _check_version() -> None:
    first, beyond = VERSIONS
    wanted = f"pip install 'litellm>={first[0]}.{first[1]},<{beyond[0]}.{beyond[1]}'"
    try:
        version = metadata.version("litellm")
    except metadata.PackageNotFoundError:
        raise RuntimeError(f"litellm is not installed: {wanted}") from None
    if not first <= tuple(int(part) for part in version.split(".")[:2]) < beyond:
        raise RuntimeError(f"litellm {version} is unknown to this guard: {wanted}")
