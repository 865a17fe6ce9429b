"""The drivers of ``tests/clients``, their SDK's client over a guarded transport instead of before a gateway.

    python tests/integrations/sdk_driver.py openai_sdk httpx2 < jobs

A job's ``url`` is ``CONFIG@UPSTREAM``. No client is ever closed, as in most programs.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path
from typing import Any

DRIVERS = Path(__file__).parents[1] / "clients" / "drivers"


@cache
def client(library: str, kind: Any, url: str, headers: tuple[tuple[str, str], ...]) -> Any:
    config, _, upstream = url.rpartition("@")
    http, guarded = importlib.import_module(library), importlib.import_module(f"guard_integrations.{library}")
    options = {"config": config, "tenant": dict(headers).get("x-tenant")}
    inner: Any
    if "Async" in kind.__name__:
        inner = http.AsyncClient(transport=guarded.AsyncGuardTransport(**options))
    else:
        inner = http.Client(transport=guarded.GuardTransport(**options))
    return kind(api_key="sk-test", base_url=upstream + ("/v1" if "OpenAI" in kind.__name__ else ""), http_client=inner)


def main(driver: str, library: str) -> None:
    sys.path.insert(0, str(DRIVERS))
    driving = importlib.import_module("driving")
    calls: dict[str, Any] = {}
    run, driving.main = driving.main, calls.update  # type: ignore[attr-defined]
    script = DRIVERS / f"{driver}.py"
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(script.read_text("utf-8"), script, "exec", dont_inherit=True), namespace)
    assert "_client" in namespace
    namespace["_client"] = lambda kind, url, headers: client(library, kind, url, headers)
    run(calls)


if __name__ == "__main__":
    main(*sys.argv[1:])
