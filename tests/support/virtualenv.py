"""Virtual environments for hosts that this project's own must not hold: exact versions, in ``.clients/NAME/``.

Made once and reused while the requirements file is unchanged. Where one cannot be made, ``Missing`` says why.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.clients.environments import CACHE, Missing

__all__ = ["Missing", "made"]


def made(name: str, requirements: Path, finish: Callable[[Path], None] | None = None) -> Path:
    """The environment's interpreter. ``finish`` gets its folder of packages; raises ``Missing``."""
    CACHE.mkdir(exist_ok=True)
    folder, digest = CACHE / name, hashlib.sha256(requirements.read_bytes()).hexdigest()
    program, stamp = folder / "bin" / "python", folder / ".made-of"
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes must not make it at once
        if stamp.exists() and stamp.read_text() == digest:
            return program
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
        pip = [sys.executable, "-m", "pip", "--python", str(program), "--disable-pip-version-check", "install"]
        _run([*pip, "--quiet", "--no-deps", "--no-compile", "-r", str(requirements)])
        if finish is not None:
            finish(next((folder / "lib").glob("python3*/site-packages")))
        stamp.write_text(digest)
    return program


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"{' '.join(argv[:4])} failed: {done.stderr.strip()[-500:]}")
