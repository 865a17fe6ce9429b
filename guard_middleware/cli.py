"""``guard-gateway``: serve, demo, check, worker, weights, policy explain."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from guard_middleware import __version__, cases, check, config, proxy
from guard_middleware.errors import ConfigError, GuardError, GuardMiddlewareError
from guard_middleware.policy import PolicySet
from guard_middleware.policy_explain import explain, to_dict
from guard_middleware.weights import commands as weights

_EPILOG = """examples:
  guard-gateway demo                                            a tour with everything on this machine
  guard-gateway serve --upstream http://127.0.0.1:8000/v1       guard a vLLM server with the default policy
  guard-gateway check --text "how do I bake bread?"             one verdict, for a human
  guard-gateway check rows.jsonl > verdicts.jsonl               many verdicts, for a script
  guard-gateway policy explain --config guard.yaml --path /v1/chat/completions --tenant acme
"""


def main(argv: list[str] | None = None) -> int:
    """The command's exit status: 0 done, 1 rows without a verdict, 2 a mistake in what was asked."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    arguments.rest = rest
    if rest and arguments.run is not _worker:  # argparse.REMAINDER would not take leading options
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        return int(arguments.run(arguments))
    except (GuardMiddlewareError, OSError) as error:
        Console(stderr=True).print(
            f"guard-gateway: {error}", style="red", markup=False, soft_wrap=True, highlight=False
        )
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="guard-gateway",
        description="A reasoning guard in front of any vision-language model API.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--log-level", default="warning", choices=("debug", "info", "warning", "error"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="the reverse proxy and its worker; prints `ready URL` when it moderates")
    serve.add_argument("--config", metavar="FILE", help="the YAML configuration (default: block harmful, fail closed)")
    serve.add_argument("--upstream", metavar="URL", help="the API to guard, such as http://127.0.0.1:8000/v1")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    serve.add_argument("--port", type=int, default=8080, help="port to listen on, 0 for any (default %(default)s)")
    serve.set_defaults(run=_serve)

    demo = commands.add_parser("demo", help="worker, gateway, scripted upstream, and a tour with the openai SDK")
    demo.add_argument("--upstream", metavar="URL", help="run the tour against a real API (its key in OPENAI_API_KEY)")
    demo.add_argument("--upstream-model", metavar="NAME", help="the model to ask there")
    demo.add_argument("--port", type=int, default=0, help="port of the gateway (default: any free one)")
    demo.add_argument("--no-serve", action="store_true", help="exit after the table, also on a terminal")
    demo.set_defaults(run=_demo)

    checks = commands.add_parser("check", help="verdicts for rows of a JSONL file, or for one case")
    checks.add_argument(
        "file", nargs="?", metavar="FILE", help='rows {"id", "prompt", "response"?, "image"?}; - is stdin'
    )
    checks.add_argument("--text", help="one prompt")
    checks.add_argument("--image", metavar="PATH", help="one picture, with or without --text")
    checks.add_argument("--response", help="an answer to judge beside the prompt")
    checks.add_argument("--model", default="nano", help="nano, a folder, or a hub id (default %(default)s)")
    checks.add_argument("--worker", metavar="URL", help="a worker that runs already: its socket's path or URL")
    checks.add_argument("--threads", type=int, help="CPU threads of the worker")
    checks.add_argument("--deadline", type=float, default=120.0, help="seconds per row (default %(default)s)")
    checks.set_defaults(run=_check)

    worker = commands.add_parser(
        "worker", help="the guard worker alone (all its options: worker --help)", add_help=False
    )
    worker.set_defaults(run=_worker)

    policy = commands.add_parser("policy", help="what the configuration means").add_subparsers(required=True)
    explained = policy.add_parser("explain", help="the effective policy of a request, and why it is that one")
    explained.add_argument("--config", metavar="FILE", help="the YAML configuration (default: the built-in policy)")
    explained.add_argument("--path", default="/v1/chat/completions", help="the request's path (default %(default)s)")
    explained.add_argument("--tenant", help="the tenant header's value")
    explained.add_argument("--api-key-env", metavar="NAME", help="the variable that holds the client's API key")
    explained.add_argument("--untrusted-peer", action="store_true", help="as if it came from outside trusted_proxies")
    explained.add_argument("--json", action="store_true", help="for a script")
    explained.set_defaults(run=_explain)
    weights.add(commands)
    return parser


def _configuration(path: str | None) -> config.Config:
    return config.load(path) if path else config.Config()


def _serve(arguments: argparse.Namespace) -> int:
    settings = _configuration(arguments.config)
    if arguments.upstream:
        settings = settings.with_upstream(arguments.upstream)
    app = proxy.create_app(settings)
    server = proxy.server(app, arguments.host, arguments.port, on_ready=lambda url: print(f"ready {url}", flush=True))
    server.run()
    if server.started:
        return 0
    return 2 if server.lifespan.should_exit else 130  # a SIGINT that is ignored by inheritance raises nothing


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from guard_middleware import demo
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed", remedy="pip install 'guard-middleware[demo]'") from None
    return demo.run(
        upstream=arguments.upstream,
        upstream_model=arguments.upstream_model,
        port=arguments.port,
        keep_serving=sys.stdout.isatty() and not arguments.no_serve,
    )


def _check(arguments: argparse.Namespace) -> int:
    options: dict[str, Any] = {"url": arguments.worker, "threads": arguments.threads}
    one = arguments.text is not None or arguments.image is not None
    if one == (arguments.file is not None):
        raise ConfigError("nothing to check, or two things", remedy="give FILE (or -), or --text and/or --image")
    if one:
        row = {"id": "1", "prompt": arguments.text, "response": arguments.response, "image": arguments.image}

        async def judge_one() -> Any:
            async with check.worker(arguments.model, **options) as client:
                return await cases.judge(client, row, base=Path(), deadline=arguments.deadline)

        outcome = asyncio.run(judge_one())
        check.show(Console(), outcome)
        return int(isinstance(outcome, GuardError))
    if arguments.file == "-":
        rows, base = list(cases.rows(sys.stdin.buffer, "-")), Path()
    else:
        with open(arguments.file, "rb") as lines:
            rows, base = list(cases.rows(lines, arguments.file)), Path(arguments.file).parent
    errors = asyncio.run(
        check.check_rows(rows, sys.stdout, base=base, model=arguments.model, deadline=arguments.deadline, **options)
    )
    return int(errors > 0)


def _worker(arguments: argparse.Namespace) -> int:
    # Another process image: the gateway never imports the worker, nor torch.
    os.execv(sys.executable, [sys.executable, "-m", "guard_middleware.worker", *arguments.rest])  # noqa: S606


def _explain(arguments: argparse.Namespace) -> int:
    settings = _configuration(arguments.config)
    key = None
    if arguments.api_key_env:
        key = os.environ.get(arguments.api_key_env)
        if not key:
            raise ConfigError(
                f"the environment variable {arguments.api_key_env} is not set", remedy="export the key in it"
            )
    facts = {"path": arguments.path, "tenant": arguments.tenant, "peer_trusted": not arguments.untrusted_peer}
    policy = PolicySet(settings).resolve(api_key=key, **facts)
    if arguments.json:
        print(json.dumps(to_dict(policy), indent=2))
    else:
        print(explain(policy, settings, api_key_given=key is not None, **facts), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
