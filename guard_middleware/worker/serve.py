"""Runs a worker app as a process: its socket, its signals, its logs, its end.

The Unix socket is made here rather than by uvicorn, which gives it mode 0666. A socket file that nobody
listens on is replaced; one that is in use, or a path that is no socket, is refused with ``ConfigError``.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import logging
import os
import signal
import socket
import stat
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from guard_middleware.errors import ConfigError

_GRACE_SECONDS = 3
_FAILED = 3


def unix_listener(path: Path) -> socket.socket:
    """A listening socket of mode 0600 at ``path``."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISSOCK(mode):
            raise ConfigError("exists and is not a socket", path=str(path), remedy="choose another --socket")
        _unlink_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(128)
    except OSError as error:
        listener.close()
        remedy = "use a shorter path (about 100 bytes)" if "too long" in str(error) else "its folder must be writable"
        raise ConfigError(f"cannot make the socket: {error}", path=str(path), remedy=remedy) from None
    finally:
        os.umask(umask)
    listener.setblocking(False)
    return listener


def _unlink_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
    raise ConfigError("another worker listens on this socket", path=str(path), remedy="stop it or choose another path")


def tcp_listener(host: str, port: int, *, anywhere: bool = False) -> socket.socket:
    """A listening socket; an address that is not loopback is refused unless ``anywhere`` is true."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not (loopback or anywhere):
        raise ConfigError(
            "the worker has no authentication and would be open to the network",
            path=f"--host {host}",
            remedy="use 127.0.0.1 or --socket, or pass --allow-remote behind your own access control",
        )
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen: {error}", path=f"{host}:{port}", remedy="choose another --port") from None
    listener.setblocking(False)
    return listener


class _Uvicorn(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or []:
            name = listener.getsockname()
            if isinstance(name, str):  # while it still listens: afterwards the path may be another worker's
                with suppress(FileNotFoundError):
                    os.unlink(name)
        await super().shutdown(sockets)


class Server:
    """One run of an app on one listening socket, until SIGTERM, SIGINT or ``fail``."""

    def __init__(self, app: ASGIApp, listener: socket.socket, *, max_frame: int, ws: str = "websockets-sansio") -> None:
        self._listener, self._failed = listener, False
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                http="httptools",
                loop="uvloop",
                ws=ws,
                ws_max_size=max_frame,
                ws_per_message_deflate=False,
                ws_ping_interval=None,  # one host: the kernel tells when the peer is gone
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )

    def fail(self) -> None:
        """Ends the run with exit status 3."""
        self._failed = True
        self.stop()

    def stop(self) -> None:
        """Ends the run as SIGTERM would, without the signal."""
        self._uvicorn.should_exit = True

    async def serve(self) -> None:
        """One run inside a loop that is already there."""
        await self._uvicorn.serve(sockets=[self._listener])

    def run(self) -> int:
        """The exit status. SIGTERM ends the process here, by that signal. The socket file is removed at the end."""
        try:
            self._uvicorn.run(sockets=[self._listener])
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        return _FAILED if self._failed else 0


def exit_with_parent() -> None:
    """Ends this process when its stdin closes: the parent holds the other end for as long as it lives."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS + 1)
        os._exit(1)

    threading.Thread(target=watch, name="guard-lifeline", daemon=True).start()


class JsonFormatter(logging.Formatter):
    """One JSON object per line; ``extra={"fields": {...}}`` adds to it.

    A traceback keeps its frames and the exception's type but not its message, which may quote what was judged.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            line["frames"] = "".join(traceback.format_tb(record.exc_info[2]))
        return json.dumps(line, default=str)


def log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
