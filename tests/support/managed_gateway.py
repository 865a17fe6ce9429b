"""``guard-gateway serve`` whose own worker is the scripted one: everything else is the product's.

    python tests/support/managed_gateway.py --config FILE --upstream URL --port 0

Prints ``worker PID EVENT [delay]`` lines beside ``ready URL``.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from guard_middleware import config, proxy
from guard_middleware.guard.supervisor import Backoff, WorkerEvent, WorkerProcess
from guard_middleware.runtime import Runtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--config", "--upstream", "--port"):
        parser.add_argument(name, required=True)
    options = parser.parse_args()
    settings = config.load(options.config).with_upstream(options.upstream)
    socket = settings.worker.socket
    assert socket is not None

    def told(event: WorkerEvent) -> None:
        if event.kind != "log":
            print(f"worker {event.pid} {event.kind} {event.delay or ''}".rstrip(), flush=True)

    runtime = Runtime(settings, remote=True)
    script = str(Path(__file__).with_name("scripted_worker.py"))
    runtime.workers.processes[config.DEFAULT_GUARD] = WorkerProcess(
        [sys.executable, script, "--socket", socket, "--exit-with-parent"],
        socket,
        on_event=told,
        backoff=Backoff(first=0.1, limit=1.0),
    )
    app = proxy.create_app(settings, runtime=runtime)
    server = proxy.server(app, "127.0.0.1", int(options.port), on_ready=lambda url: print(f"ready {url}", flush=True))
    with contextlib.suppress(KeyboardInterrupt):
        server.run()


if __name__ == "__main__":
    main()
