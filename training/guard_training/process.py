"""``guard-train`` in a process of its own, and how one ends with the process that started it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import IO

#: Starts ``guard-train`` in a process of its own.
LAUNCH = (sys.executable, "-m", "guard_training")
#: The exit statuses of a command that was stopped by SIGINT or SIGTERM, as a shell names them.
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
#: Seconds that a process is given to end by itself after it was asked to; then it is killed.
GRACE_SECONDS = 10.0


def run_child(command: Sequence[str], output: IO[bytes] | None = None) -> int:
    """The exit status of ``command``, whose words go to ``output`` or to this terminal.

    It never outlives this call: where the wait is broken off, by SIGTERM say, it is ended too. Raises
    ``KeyboardInterrupt`` where it was stopped by Ctrl-C, which goes to both.
    """
    with subprocess.Popen(command, stdout=output, stderr=output) as process:  # noqa: S603
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    return status


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises ``SystemExit`` here, so that what was opened is closed and what was started is ended."""
    own = os.getpid()

    def end(number: int, frame: object) -> None:
        if os.getpid() != own:  # a forked helper has nothing to close
            os._exit(TERMINATED)
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
