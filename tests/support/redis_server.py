"""A real redis-server (or valkey-server) on a Unix socket, that a test may stop, pause and start again."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

BINARY = shutil.which("redis-server") or shutil.which("valkey-server")


needs_redis = pytest.mark.skipif(
    BINARY is None or importlib.util.find_spec("redis") is None,
    reason="redis-server (or valkey-server) or the redis package is not installed",
)


class RedisServer:
    def __init__(self, folder: Path) -> None:
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._popen: subprocess.Popen[bytes] | None = None
        self._folder = folder

    def start(self) -> None:
        assert BINARY is not None
        options = ["--port", "0", "--unixsocket", str(self.socket), "--save", "", "--appendonly", "no"]
        self._popen = subprocess.Popen(
            [BINARY, *options, "--dir", str(self._folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(self.socket))
                connection.sendall(b"PING\r\n")
                if connection.recv(16).startswith(b"+PONG"):
                    return
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.01)

    def stop(self) -> None:
        if self._popen is not None:
            self._popen.send_signal(signal.SIGCONT)
            self._popen.kill()
            self._popen.wait()
            self.socket.unlink(missing_ok=True)

    def pause(self) -> None:
        assert self._popen is not None
        self._popen.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._popen is not None
        self._popen.send_signal(signal.SIGCONT)
