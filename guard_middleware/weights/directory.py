"""The weights directory: one folder per revision, ``state.json``, and two locks.

``state.json`` is replaced whole (written beside, fsync, rename, fsync of the directory), so a reader finds the state
before a change or after it, whatever is killed. Writers take ``state.lock`` for the moment of a change. A gateway
holds ``gateway.lock`` as long as it follows the directory; the kernel lets go of both when a process ends.

Refuses (``ConfigError``): a directory that cannot be written, a state that is not one, a second gateway.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from guard_middleware.errors import ConfigError
from guard_middleware.weights import manifest, state
from guard_middleware.weights.state import Refused, Revision, State

#: how long a gateway's start waits for a command that changes the state without one
_LOCK_SECONDS = 5.0


def now() -> str:
    """UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class WeightsDirectory:
    """``model`` is what serves where there is no state yet: the configuration's ``worker.model``."""

    def __init__(self, folder: str | Path, model: str | None = None) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self._path = self.folder / "state.json"
        self._first = None if model is None else State(Revision(Path(model).name or model, model))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot be made ({error.strerror})",
                path=str(self.folder),
                remedy="give weights.directory another path",
            ) from None

    def stamp(self) -> object:
        """Another value whenever the state has changed."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def read(self) -> State:
        try:
            return state.decode(json.loads(self._path.read_bytes()))
        except FileNotFoundError:
            if self._first is None:
                raise ConfigError(
                    "no gateway has followed it yet",
                    path=str(self.folder),
                    remedy="give --config FILE instead: its worker.model is what serves first",
                ) from None
            return self._first
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"is no state of weights ({error})",
                path=str(self._path),
                remedy="move it away: worker.model then serves, and what is staged is forgotten",
            ) from None

    def update(self, change: Callable[[State], State]) -> State:
        """The state after ``change``, on the disk; raises what ``change`` raises, and then nothing has changed."""
        with self._locked("state.lock", fcntl.LOCK_EX):
            before = self.read()
            after = change(before)
            if after != before:
                self._write(after)
            return after

    @contextlib.contextmanager
    def following(self, *, seconds: float = _LOCK_SECONDS) -> Iterator[None]:
        """For one process at a time; raises ``ConfigError`` where another one follows the directory."""
        end = time.monotonic() + seconds
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(self._locked("gateway.lock", fcntl.LOCK_EX | fcntl.LOCK_NB))
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise ConfigError(
                            "another gateway follows this directory",
                            path=str(self.folder),
                            remedy="give each gateway a weights.directory of its own",
                        ) from None
                    time.sleep(0.05)
            yield

    def followed(self) -> bool:
        """Whether a gateway follows the directory now."""
        try:
            with self._locked("gateway.lock", fcntl.LOCK_SH | fcntl.LOCK_NB):  # shared: those who ask do not collide
                return False
        except BlockingIOError:
            return True

    def find(self, name: str) -> Path:
        """The folder of a revision: one in here, or any other by its path. Raises ``Refused``."""
        for folder in (self.folder / name, Path(name).expanduser().absolute()):
            if folder.is_dir():
                return folder
        names = ", ".join(path.name for path in self.revisions()) or "none yet"
        raise Refused(f"no revision {name} in {self.folder} (there are: {names}), and no such folder")

    def revisions(self) -> list[Path]:
        """The folders in here that have checksums, by name."""
        return sorted(path.parent for path in self.folder.glob(f"*/{manifest.SUMS}"))

    def _write(self, value: State) -> None:
        part = self._path.with_suffix(".part")
        with part.open("wb") as file:
            file.write(json.dumps(state.encode(value), indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)
        directory = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @contextlib.contextmanager
    def _locked(self, name: str, how: int) -> Iterator[None]:
        try:
            lock = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"cannot be written ({error.strerror})", path=str(self.folder), remedy="let this user write there"
            ) from None
        try:
            fcntl.flock(lock, how)
            yield
        finally:
            os.close(lock)
