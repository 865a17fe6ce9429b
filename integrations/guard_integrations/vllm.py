"""The guard inside a vLLM server: its own OpenAI and Anthropic API is screened in the same process.

    GUARD_CONFIG=guard.yaml vllm serve MODEL --middleware guard_integrations.vllm.VLLMGuard

vLLM makes its middleware without arguments, so the configuration's file comes by the environment. Probes and metrics
(``UNGUARDED``) answer as ever.

Refuses every other route of vLLM that is none of the dialects', whether it carries content (tokenize, pooling,
embeddings, render, token-in-token-out, audio, realtime, SageMaker's invocations) or controls the engine; and to start
at all where the configuration is missing or broken.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from guard_middleware.errors import ConfigError
from guard_middleware.middleware import GuardMiddleware

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

#: what probes and Prometheus ask by GET, none of which takes or gives content
UNGUARDED: Final = ("/health", "/ping", "/metrics", "/version", "/load")
VARIABLE: Final = "GUARD_CONFIG"


class VLLMGuard:
    """What ``--middleware`` names."""

    def __init__(self, app: ASGIApp) -> None:
        self._guarded: ASGIApp
        try:
            self._guarded = GuardMiddleware(app, config=_file(), unguarded=UNGUARDED)
        except ConfigError as error:
            # Raised here it would not stop the server: uvicorn takes it for an application without lifespan.
            self._guarded = _Unstartable(error)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guarded(scope, receive, send)


class _Unstartable:
    """Ends the server's start with the error; where a server runs no lifespan, it answers nothing."""

    def __init__(self, error: ConfigError) -> None:
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            raise self._error
        await receive()
        await send({"type": "lifespan.startup.failed", "message": str(self._error)})


def _file() -> str:
    if path := os.environ.get(VARIABLE):
        return path
    raise ConfigError(f"the environment variable {VARIABLE} is not set", remedy="let it name the guard's YAML file")
