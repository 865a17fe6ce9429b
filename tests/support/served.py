"""An ASGI application on a free port of this machine, in a thread."""

from __future__ import annotations

import threading
from typing import Any, Self

import uvicorn

from tests.support.gateway import PATIENCE, eventually


class Served:
    """``with Served(app) as server: server.url``. ``options`` are uvicorn's."""

    def __init__(self, app: Any, **options: Any) -> None:
        options = {"ws": "websockets-sansio", **options}
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, **options))
        self._thread = threading.Thread(target=self._server.run, name="served", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        eventually(lambda: self._server.started or not self._thread.is_alive())
        assert self._server.started, "the application did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
