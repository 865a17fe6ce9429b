"""Environments for hosts and clients that this project's own must not hold: exact versions, in ``.clients/NAME/``.

Made once and reused while the file that they are made of is unchanged; git ignores them. Where one cannot be made,
``Missing`` says why.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".clients"


class Missing(Exception):
    """What this machine lacks for an environment."""


def made(name: str, requirements: Path, finish: Callable[[Path], None] | None = None) -> Path:
    """The interpreter of a Python environment. ``finish`` gets its folder of packages; raises ``Missing``."""
    program = CACHE / name / "bin" / "python"

    def make(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
        pip = [sys.executable, "-m", "pip", "--python", str(program), "--disable-pip-version-check", "install"]
        run([*pip, "--quiet", "--no-deps", "--no-compile", "-r", str(requirements)])
        if finish is not None:
            finish(next((folder / "lib").glob("python3*/site-packages")))

    once(name, requirements, make)
    return program


def once(name: str, source: Path, make: Callable[[Path], None]) -> Path:
    """The folder of an environment, for which ``make`` is called where it was not made of ``source`` as it is now."""
    CACHE.mkdir(exist_ok=True)
    folder, digest = CACHE / name, hashlib.sha256(source.read_bytes()).hexdigest()
    stamp = folder / ".made-of"
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes must not make it at once
        if not stamp.exists() or stamp.read_text() != digest:
            make(folder)
            stamp.write_text(digest)
    return folder


def run(argv: list[str], folder: Path | None = None) -> None:
    """Runs a command to its end; raises ``Missing`` with what it said where it fails."""
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"{' '.join(argv[:4])} failed: {done.stderr.strip()[-500:]}")
