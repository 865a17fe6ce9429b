"""The guard worker as a Ray Serve deployment: replicas behind one URL, more of them under load, none that cannot judge.

    serve run serve.yaml                                  # integrations/examples/ray_serve
    serve run guard_integrations.ray_serve:app model=nano threads=2

It is the same app as ``guard-gateway worker`` serves, with that command's options as arguments (``max_batch: 16`` is
``--max-batch 16``; a list is the option repeated). A replica is routed to once its model has given a verdict, and is
replaced when its engine is stuck. A gateway points to it with ``worker: {url: http://HOST:8000, balanced: true}``.

Refuses, with ``ConfigError``: options that the worker refuses, alone or beside each other, values that are no word,
number, truth or list of them, and options that say where it listens (Serve does).
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from functools import partial
from typing import Any

from ray import serve

from guard_middleware.errors import ConfigError
from guard_middleware.worker.__main__ import load
from guard_middleware.worker.app import Guard, Worker
from guard_middleware.worker.batching import BatchLimits
from guard_middleware.worker.metrics import Metrics
from guard_middleware.worker.options import check, in_flight, limits, parser

Load = Callable[[Metrics], Awaitable[Guard]]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

#: options that are Serve's business
_NOT_HERE = {"socket", "port", "host", "allow_remote", "exit_with_parent", "log_level"}


def app(args: Mapping[str, Any]) -> serve.Application:
    """The application that ``serve run`` and a Serve configuration build; ``args`` are the worker's options."""
    argv = [flag for name, value in args.items() for flag in _flags(name, value)]
    try:
        options = _Parser(parents=[parser()], add_help=False).parse_args(argv)
    except ValueError as error:
        raise ConfigError(f"args of the guard: {error}", remedy="see guard-gateway worker --help") from None
    check(options)
    return application(partial(load, options), stall_seconds=options.stall_seconds, takes=limits(options))


def application(guard: Load, *, stall_seconds: float = 60.0, takes: BatchLimits | None = None) -> serve.Application:
    """The deployment ``Guard`` around what ``guard`` loads in each replica; it must be importable there.

    ``takes`` is what one replica's guard runs at once and lets wait; Serve gives it no more than it takes.
    """
    takes = takes or BatchLimits()
    most = takes.batch + min(3 * takes.batch, takes.queue)
    scaling = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": (most + 1) // 2}
    deployment = _DEPLOYMENT.options(max_ongoing_requests=most, autoscaling_config=scaling)
    return deployment.bind(guard, stall_seconds, in_flight(takes))


def _flags(name: str, value: object) -> list[str]:
    if name.replace("-", "_") in _NOT_HERE:
        remedy = "write http_options or logging_config in Serve's configuration"
        raise ConfigError(f"args of the guard: `{name}` is Serve's business", remedy=remedy)
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{flag}"]
    values = value if isinstance(value, list) else [value]
    if any(type(one) not in (str, int, float) for one in values):
        remedy = "write a word, a number, true or false, or a list: vllm_arg: [tensor_parallel_size=2, dtype=float16]"
        raise ConfigError(f"args of the guard: `{name}` has a value that is no option's", remedy=remedy)
    return [f"--{flag}={one}" for one in values]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ValueError(message)


class Replica:
    """One worker. It starts when its guard is ready and ends when its guard fails, as Serve understands both."""

    def __init__(self, guard: Load, stall_seconds: float, max_in_flight: int) -> None:
        self._settled = asyncio.Event()
        self._failure: str | None = None
        self._worker = Worker(
            guard,
            max_in_flight=max_in_flight,
            stall_seconds=stall_seconds,
            on_ready=lambda guard: self._settled.set(),
            on_failed=self._failed,
        )

    def __serve_build_asgi_app__(self) -> Callable[[Message, Receive, Send], Awaitable[None]]:
        async def app(scope: Message, receive: Receive, send: Send) -> None:  # uvicorn takes a method for ASGI 2
            await self._worker.asgi(scope, receive, self._when_ready(send) if scope["type"] == "lifespan" else send)

        return app

    async def check_health(self) -> None:
        """Raises where the guard cannot judge any more; Serve then starts another replica."""
        if self._failure is not None:
            raise RuntimeError(self._failure)

    def _when_ready(self, send: Send) -> Send:
        async def started(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                await self._settled.wait()
                if self._failure is not None:
                    message = {"type": "lifespan.startup.failed", "message": self._failure}
            await send(message)

        return started

    def _failed(self, why: str) -> None:
        self._failure = why
        self._settled.set()


#: The numbers are a start; set them under ``deployments`` in Serve's configuration. ``max_ongoing_requests``
#: (``application``) keeps a replica's batches full, and its queue a few verdicts long; what is beyond
#: ``max_queued_requests`` at one proxy is refused there, which a gateway hears as ``overloaded``.
_DEPLOYMENT = serve.deployment(
    serve.ingress()(Replica),
    name="Guard",
    max_queued_requests=256,
    health_check_period_s=5,
    health_check_timeout_s=15,
)
