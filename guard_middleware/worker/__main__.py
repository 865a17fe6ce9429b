"""``python -m guard_middleware.worker``: one guard model behind one socket."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from guard_middleware.errors import ConfigError
from guard_middleware.worker import endpoint, serve, vllm_options
from guard_middleware.worker.app import MAX_FRAME, Guard, Worker
from guard_middleware.worker.calibration import Calibration
from guard_middleware.worker.calibration import read as read_calibration
from guard_middleware.worker.engine import BatchEngine, Engine
from guard_middleware.worker.guards import guard_format
from guard_middleware.worker.metrics import Metrics
from guard_middleware.worker.options import check, in_flight, limits, parser, vllm_args
from guard_middleware.worker.reading import DrawnText, Reader
from guard_middleware.worker.service import GuardService, ServiceLimits
from guard_middleware.worker.weights import Weights, resolve, serving


async def load(options: argparse.Namespace, metrics: Metrics) -> Guard:
    """The model and its reader on a thread (which may fetch the weights first), then one real verdict."""
    if options.endpoint is not None:
        return await _remote(options)
    service = (await asyncio.to_thread(_build, options))(metrics, limits=ServiceLimits(limits(options)))
    try:
        await service.warm_up()
    except BaseException:
        await service.aclose()
        raise
    return service


async def _remote(options: argparse.Namespace) -> Guard:
    try:
        policy = None if options.policy_text is None else options.policy_text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "--policy-text names a file of UTF-8 text"
        raise ConfigError(f"the policy text cannot be read ({error})", remedy=remedy) from None
    remote = endpoint.EndpointOptions(
        options.endpoint,
        options.endpoint_model,
        key=os.environ.get("GUARD_ENDPOINT_KEY"),
        revision=options.endpoint_revision,
        ignore=frozenset([options.ignore]) if options.ignore else frozenset(),
        concurrency=options.endpoint_concurrency,
        max_queue=options.max_queue,
    )
    by_default = options.reader is True
    drawn = DrawnText(await asyncio.to_thread(_reader, options.reader, by_default), by_default=by_default)
    return await endpoint.load(guard_format(options.guard_format, policy), remote, policy=policy, drawn=drawn)


def _build(options: argparse.Namespace) -> Callable[..., GuardService]:
    """The service but for what it needs the event loop for."""
    weights = resolve(options.model)
    calibration = read_calibration(weights.folder, weights.facts.revision) if options.calibration else Calibration()
    by_default = weights.facts.reader if options.reader is None else options.reader
    changes = vllm_options.deciding(vllm_args(options))
    if by_default != weights.facts.reader:
        changes["--reader"] = by_default
    reader = _reader(options.reader, by_default)
    build: Callable[[Weights, argparse.Namespace], BatchEngine | Engine]
    build = _vllm if options.engine == "vllm" else _transformers
    return partial(
        GuardService,
        build(weights, options),
        reader=reader,
        read_by_default=by_default,
        calibration=calibration,
        serving=serving(changes),
    )


def _reader(wanted: bool | None, by_default: bool) -> Reader | None:
    """A policy may ask for it where it is not the default, so it is there if it can be."""
    if wanted is False:
        return None
    from guard_middleware.guard.reader import Reader as DrawnTextReader

    try:
        return DrawnTextReader()
    except ConfigError:
        if by_default:
            raise
        return None


def _transformers(weights: Weights, options: argparse.Namespace) -> BatchEngine:
    try:
        import torch

        from guard_middleware.worker.engine_transformers import TransformersEngine
    except ModuleNotFoundError as error:
        remedy = "pip install 'guard-middleware[worker,ocr]'"
        raise ConfigError(f"the worker needs {error.name}, which is not installed", remedy=remedy) from None
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return TransformersEngine(weights, max_batch=limits(options).batch)


def _vllm(weights: Weights, options: argparse.Namespace) -> Engine:
    args = vllm_args(options)
    try:
        from guard_middleware.worker.engine_vllm import VllmEngine
    except ModuleNotFoundError as error:
        remedy = "pip install 'guard-middleware[vllm]' where there is a GPU, or choose --engine transformers"
        why = f"--engine vllm needs {error.name}, which is not installed"
        raise ConfigError(why, path="--engine", remedy=remedy) from None
    return VllmEngine(weights, max_batch=limits(options).batch // vllm_options.ranks(args), args=args)


def main(argv: Sequence[str] | None = None) -> int:
    cli = parser()
    options = cli.parse_args(argv)
    if (options.socket is None) == (options.port is None):
        cli.error("give either --socket PATH or --port N")
    try:
        check(options)
        takes = limits(options)
        if options.socket is not None:
            listener = serve.unix_listener(options.socket)
            where = str(options.socket)
        else:
            listener = serve.tcp_listener(options.host, options.port, anywhere=options.allow_remote)
            where = "http://{}:{}".format(*listener.getsockname()[:2])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    serve.log_to_stderr(options.log_level)
    if options.exit_with_parent:
        serve.exit_with_parent()

    def ready(guard: Guard) -> None:
        print(f"worker ready model={guard.model} revision={guard.revision} socket={where}", flush=True)

    def failed(why: str) -> None:
        print(f"error: {why}", file=sys.stderr, flush=True)
        server.fail()

    worker = Worker(
        lambda metrics: load(options, metrics),
        max_in_flight=in_flight(takes),
        stall_seconds=options.stall_seconds,
        on_ready=ready,
        on_failed=failed,
    )
    server = serve.Server(worker.asgi, listener, max_frame=MAX_FRAME)
    status = server.run()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # not sys.exit: it would wait for a thread that hangs in the engine


if __name__ == "__main__":
    sys.exit(main())
