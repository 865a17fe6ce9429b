"""vLLM's own application without an engine; run by the environment of ``tests/vllm_environment.py``.

python vllm_app.py routes          every route that vLLM has, as JSON: [[method, path], ...]
python vllm_app.py serve PORT      vLLM's launcher with its application and our middleware
"""

from __future__ import annotations

import asyncio
import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any, get_args

import vllm.entrypoints
import vllm.tasks
from fastapi import APIRouter
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.launchers.launcher import serve_http
from vllm.utils.argparse_utils import FlexibleArgumentParser


def app(*options: str) -> Any:
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(list(options))
    tasks = [task for kind in get_args(vllm.tasks.SupportedTask) for task in get_args(kind) or (kind,)]
    return build_app(args, tuple(tasks))


def routers() -> Iterator[Any]:
    """The routers of every module, whether this build would mount them for some model or not."""
    for module in pkgutil.walk_packages(vllm.entrypoints.__path__, "vllm.entrypoints."):
        if module.name.endswith("api_router"):
            found = vars(importlib.import_module(module.name)).values()
            yield from (value for value in found if isinstance(value, APIRouter))


def routes() -> list[list[str]]:
    seen = set()
    for owner in (app("--enable-scale-out"), *routers()):
        for route in owner.routes:
            websocket = "WebSocket" in type(route).__name__
            for method in ["WEBSOCKET"] if websocket else getattr(route, "methods", None) or ["GET", "POST"]:
                seen.add((method, route.path))
    return [list(one) for one in sorted(seen)]


async def serve(port: str) -> None:
    application = app("--middleware", "guard_integrations.vllm.VLLMGuard")
    application.state.log_stats, application.state.engine_client = False, None
    shutdown = await serve_http(application, sock=None, host="127.0.0.1", port=int(port), log_level="info")
    await shutdown


if __name__ == "__main__":
    if sys.argv[1] == "routes":
        print(json.dumps(routes()))
    else:
        asyncio.run(serve(sys.argv[2]))
