"""What the worker can be told: its options, which of them go together, and how much the guard takes on with them.

Refuses (``ConfigError``): an option that says nothing beside the others, or contradicts them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from guard_middleware.errors import ConfigError
from guard_middleware.worker import vllm_options
from guard_middleware.worker.batching import BatchLimits
from guard_middleware.worker.guards import NAMES

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


#: options that say nothing without --endpoint, and those that say nothing with it
_REMOTE = ("endpoint_model", "guard_format", "policy_text", "endpoint_revision", "ignore", "endpoint_concurrency")
_LOCAL = ("engine", "vllm_arg", "vllm_args", "threads", "max_batch", "max_queue_tokens", "calibration")


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
        "--max-batch", type=_positive, help="prompts that run at once (default: 8, and 256 per rank with --engine vllm)"
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


def check(options: argparse.Namespace) -> None:
    """Raises ``ConfigError`` for options that say nothing beside the others, or contradict them."""
    default = parser().get_default
    stated = {name for name, value in vars(options).items() if value != default(name)}
    near, far = ([name for name in names if name in stated] for names in (_LOCAL, _REMOTE))
    if options.endpoint is None and far:
        raise ConfigError("says nothing without --endpoint", path=_flag(far[0]), remedy="add --endpoint URL")
    if options.endpoint is not None:
        if "model" in stated:
            raise ConfigError("give either --model or --endpoint: a worker has one guard", path="--model")
        if options.endpoint_model is None or options.guard_format is None:
            remedy = "add --endpoint-model NAME and --guard-format NAME"
            raise ConfigError("needs to know the model and its format", path="--endpoint", remedy=remedy)
        if near:
            why = "says nothing with --endpoint: the server there runs the model"
            raise ConfigError(why, path=_flag(near[0]), remedy="leave it out")
    if options.engine != "vllm" and (options.vllm_arg or options.vllm_args):
        raise ConfigError("--vllm-arg is for another engine", path="--vllm-arg", remedy="add --engine vllm")
    if options.engine == "vllm" and options.threads is not None:
        raise ConfigError("--threads is for the CPU", path="--threads", remedy="leave it out, or set OMP_NUM_THREADS")
    vllm_args(options)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def limits(options: argparse.Namespace) -> BatchLimits:
    """What the guard of such options takes on: prompts that run at once on all its ranks, and those that wait."""
    if options.endpoint is not None:
        return BatchLimits(options.endpoint_concurrency, options.max_queue)
    batch = options.max_batch or (256 if options.engine == "vllm" else 8)
    return BatchLimits(batch * vllm_options.ranks(vllm_args(options)), options.max_queue, options.max_queue_tokens)


def in_flight(limits: BatchLimits) -> int:
    """Questions of one connection: twice what the guard takes, so that its own queue is the first to refuse."""
    return 2 * (limits.batch + limits.queue)


def vllm_args(options: argparse.Namespace) -> dict[str, Any]:
    """vLLM's arguments by field name: those of the file, and over them those on the line."""
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
