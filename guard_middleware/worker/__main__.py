"""``python -m guard_middleware.worker``: one guard model behind one socket."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guard_middleware.errors import ConfigError
from guard_middleware.worker import endpoint, serve
from guard_middleware.worker.app import MAX_FRAME, Guard, Worker
from guard_middleware.worker.batching import BatchLimits
from guard_middleware.worker.calibration import Calibration
from guard_middleware.worker.calibration import read as read_calibration
from guard_middleware.worker.engine import BatchEngine, Engine
from guard_middleware.worker.guards import NAMES, guard_format
from guard_middleware.worker.metrics import Metrics
from guard_middleware.worker.reading import DrawnText, Reader
from guard_middleware.worker.service import GuardService, ServiceLimits
from guard_middleware.worker.weights import Weights, resolve

_EPILOG = """\
examples:
  the bundled guard on a Unix socket, where a gateway on this host finds it
      python -m guard_middleware.worker --socket /run/guard/guard.sock
  a published guard from the hub's cache, on TCP
      python -m guard_middleware.worker --model yueliu1999/GuardReasoner-VL-Eco-3B --port 9000
  the same on a GPU, on vLLM, split over two cards
      python -m guard_middleware.worker --model yueliu1999/GuardReasoner-VL-Eco-3B --socket /run/guard/guard.sock \\
          --engine vllm --vllm-arg tensor_parallel_size=2
  a guard that a server beside it runs (docs/guards.md); no torch is needed here
      python -m guard_middleware.worker --socket /run/guard/guard.sock --endpoint http://127.0.0.1:8000 \\
          --endpoint-model Qwen/Qwen3Guard-Gen-4B --guard-format qwen3guard-gen

It prints `worker ready model=... revision=... socket=...` on stdout when it can moderate. Ask it how it is:
      curl --unix-socket /run/guard/guard.sock http://worker/ready      (also /health and /metrics)

Exit status: 0 or the signal's when it was told to stop, 2 for wrong options, 3 when the guard cannot be
loaded or its engine is stuck. Logs are JSON lines on stderr and hold no content of what is judged.
"""


_REMOTE = ("endpoint_model", "guard_format", "policy_text", "endpoint_revision", "ignore")


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="python -m guard_middleware.worker",
        description="Runs a guard model and answers a gateway's questions about conversations.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_argument(
        "--model", default="nano", help="nano (bundled), a folder, or a hub id such as OWNER/NAME (default: nano)"
    )
    where = cli.add_argument_group("where it listens (--socket or --port)")
    where.add_argument("--socket", type=Path, metavar="PATH", help="Unix socket, made with mode 0600")
    where.add_argument("--port", type=int, help="TCP port instead; 0 takes a free one")
    where.add_argument("--host", default="127.0.0.1", help="with --port; loopback only (default: 127.0.0.1)")
    where.add_argument(
        "--allow-remote", action="store_true", help="accept a --host that others can reach; there is no authentication"
    )
    engine = cli.add_argument_group("what runs the model (docs/worker.md)")
    engine.add_argument(
        "--engine",
        choices=["transformers", "vllm"],
        default="transformers",
        help="transformers, which runs anywhere, or vllm, for a GPU (default: transformers)",
    )
    engine.add_argument(
        "--vllm-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one of vLLM's engine arguments, the value as JSON or as a bare word; may be repeated",
    )
    engine.add_argument("--vllm-args", type=Path, metavar="FILE", help="several of them, as one JSON object")
    load = cli.add_argument_group("how much it takes on")
    load.add_argument("--threads", type=_positive, help="CPU threads of the model (default: torch's choice)")
    load.add_argument(
        "--max-batch", type=_positive, help="prompts that run at once (default: 8, and 256 with --engine vllm)"
    )
    load.add_argument(
        "--max-queue", type=_positive, default=256, help="prompts that wait; more are told to come back (default: 256)"
    )
    load.add_argument(
        "--max-queue-tokens", type=_positive, default=262_144, help="their tokens, together (default: 262144)"
    )
    load.add_argument(
        "--reader",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="read text drawn in images (default: as guard.json says, at an endpoint no); needs the ocr extra",
    )
    load.add_argument(
        "--calibration",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="scores as the model's calibration.json says; --no-calibration gives its own (default: --calibration)",
    )
    remote = cli.add_argument_group("a guard that an OpenAI-compatible endpoint runs, instead of --model")
    remote.add_argument("--endpoint", metavar="URL", help="its root or /v1; a key is read from GUARD_ENDPOINT_KEY")
    remote.add_argument("--endpoint-model", metavar="NAME", help="the model's name there")
    remote.add_argument("--guard-format", choices=NAMES, help="the published prompt and output that the model has")
    remote.add_argument("--policy-text", type=Path, metavar="FILE", help="your policy, for formats that take one")
    remote.add_argument("--endpoint-revision", default="", metavar="TEXT", help="say another when its weights change")
    remote.add_argument(
        "--ignore",
        choices=["text", "image"],
        help="content that this guard does not read and another of your ensemble does (default: refused)",
    )
    remote.add_argument("--endpoint-concurrency", type=_positive, default=32, help="calls at once (default: 32)")
    run = cli.add_argument_group("how it runs")
    run.add_argument(
        "--stall-seconds",
        type=_positive,
        default=60,
        help="give up when the engine is stuck for so long in work that nobody waits for (default: 60)",
    )
    run.add_argument(
        "--exit-with-parent", action="store_true", help="stop when stdin closes; set by a gateway that starts it"
    )
    run.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    return cli


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError("must be positive")
    return value


async def load(options: argparse.Namespace, metrics: Metrics) -> Guard:
    """The model and its reader on a thread (which may fetch the weights first), then one real verdict."""
    if options.endpoint is not None:
        return await _remote(options)
    engine, reader, read_by_default, calibration = await asyncio.to_thread(_build, options)
    limits = ServiceLimits(BatchLimits(_max_batch(options), options.max_queue, options.max_queue_tokens))
    service = GuardService(
        engine, metrics, reader=reader, read_by_default=read_by_default, calibration=calibration, limits=limits
    )
    try:
        await service.warm_up()
    except BaseException:
        await service.aclose()
        raise
    return service


async def _remote(options: argparse.Namespace) -> Guard:
    if options.endpoint_model is None or options.guard_format is None:
        remedy = "add --endpoint-model NAME and --guard-format NAME"
        raise ConfigError("--endpoint needs to know the model and its format", remedy=remedy)
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


def _max_batch(options: argparse.Namespace) -> int:
    return int(options.max_batch or (256 if options.engine == "vllm" else 8))


def _build(options: argparse.Namespace) -> tuple[BatchEngine | Engine, Reader | None, bool, Calibration]:
    weights = resolve(options.model)
    calibration = read_calibration(weights.folder, weights.facts.revision) if options.calibration else Calibration()
    read_by_default = weights.facts.reader if options.reader is None else options.reader
    reader = _reader(options.reader, read_by_default)
    build = _vllm if options.engine == "vllm" else _transformers
    return build(weights, options), reader, read_by_default, calibration


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
    if options.vllm_arg or options.vllm_args:
        raise ConfigError("--vllm-arg is for another engine", path="--vllm-arg", remedy="add --engine vllm")
    try:
        import torch

        from guard_middleware.worker.engine_transformers import TransformersEngine
    except ModuleNotFoundError as error:
        remedy = "pip install 'guard-middleware[worker,ocr]'"
        raise ConfigError(f"the worker needs {error.name}, which is not installed", remedy=remedy) from None
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return TransformersEngine(weights, max_batch=_max_batch(options))


def _vllm(weights: Weights, options: argparse.Namespace) -> Engine:
    if options.threads is not None:
        raise ConfigError("--threads is for the CPU", path="--threads", remedy="leave it out, or set OMP_NUM_THREADS")
    args = _vllm_args(options)
    try:
        from guard_middleware.worker.engine_vllm import VllmEngine
    except ModuleNotFoundError as error:
        remedy = "pip install 'guard-middleware[vllm]' where there is a GPU, or choose --engine transformers"
        why = f"--engine vllm needs {error.name}, which is not installed"
        raise ConfigError(why, path="--engine", remedy=remedy) from None
    return VllmEngine(weights, max_batch=_max_batch(options), args=args)


def _vllm_args(options: argparse.Namespace) -> dict[str, Any]:
    args: dict[str, Any] = {}
    if options.vllm_args is not None:
        try:
            read = json.loads(options.vllm_args.read_text("utf-8"))
        except (OSError, ValueError) as error:
            why = f"cannot be read as JSON ({type(error).__name__})"
            raise ConfigError(why, path=f"--vllm-args {options.vllm_args}") from None
        if not isinstance(read, dict):
            raise ConfigError("must hold one JSON object", path=f"--vllm-args {options.vllm_args}")
        args |= read
    for stated in options.vllm_arg:
        key, equals, value = stated.partition("=")
        if not equals or not key:
            raise ConfigError("is no KEY=VALUE", path=f"--vllm-arg {stated}", remedy="as in tensor_parallel_size=2")
        try:
            args[key.replace("-", "_")] = json.loads(value)
        except ValueError:
            args[key.replace("-", "_")] = value
    return args


def main(argv: Sequence[str] | None = None) -> int:
    cli = parser()
    options = cli.parse_args(argv)
    if (options.socket is None) == (options.port is None):
        cli.error("give either --socket PATH or --port N")
    if options.endpoint is None and (stray := [name for name in _REMOTE if getattr(options, name)]):
        cli.error(f"--{stray[0].replace('_', '-')} says nothing without --endpoint URL")
    if options.endpoint is not None and options.model != cli.get_default("model"):
        cli.error("give either --model or --endpoint: a worker has one guard")
    try:
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
