"""Where each client runs: this interpreter, a virtual environment of its own, or node.

The last two are made once, from exact versions, in ``.clients/`` at the repository's root, which git ignores. Where
there is no npm or no registry they raise ``Missing``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".clients"


class Missing(Exception):
    """What this machine lacks for a client."""


def variables() -> dict[str, str]:
    """This process's own without proxies, which would be asked for loopback addresses too, and without its path."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {name: value for name, value in kept.items() if name != "PYTHONPATH"}


def _here(driver: str) -> list[str]:
    return [sys.executable, str(HERE / "drivers" / driver)]


def _python(driver: str) -> list[str]:
    """The interpreter of the other environment, which is made anew when its requirements have changed."""
    folder = CACHE / "python"
    program = folder / "bin" / "python"
    requirements = HERE / "requirements.txt"
    if not _made(folder, requirements):
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
        pip = [sys.executable, "-m", "pip", "--python", str(program), "--disable-pip-version-check", "install"]
        _run([*pip, "--quiet", "--no-deps", "--no-compile", "-r", str(requirements)])
        _make(folder, requirements)
    return [str(program), str(HERE / "drivers" / driver)]


def _node(driver: str) -> list[str]:
    """node, beside the installed packages: modules are looked up from where the driver lies."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        raise Missing("there is no npm")
    folder, lock = CACHE / "js", HERE / "js" / "package-lock.json"
    folder.mkdir(parents=True, exist_ok=True)
    for file in (HERE / "js").iterdir():
        shutil.copy(file, folder)
    if not _made(folder, lock):
        _run(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], folder)
        _make(folder, lock)
    return ["node", str(folder / driver)]


def _made(folder: Path, source: Path) -> bool:
    stamp = folder / ".made-of"
    return stamp.exists() and stamp.read_text() == hashlib.sha256(source.read_bytes()).hexdigest()


def _make(folder: Path, source: Path) -> None:
    (folder / ".made-of").write_text(hashlib.sha256(source.read_bytes()).hexdigest())


def _run(argv: list[str], folder: Path | None = None) -> None:
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"{' '.join(argv[:4])} failed: {done.stderr.strip()[-500:]}")


#: client -> its driver and what runs it
DRIVERS: Mapping[str, tuple[Callable[[str], list[str]], str]] = {
    "openai (Python)": (_here, "openai_sdk.py"),
    "anthropic (Python)": (_here, "anthropic_sdk.py"),
    "LangChain (Python)": (_python, "langchain_chat.py"),
    "LiteLLM SDK (Python)": (_python, "litellm_sdk.py"),
    "openai (JavaScript)": (_node, "openai.mjs"),
    "@anthropic-ai/sdk (JavaScript)": (_node, "anthropic.mjs"),
    "Vercel ai (JavaScript)": (_node, "vercel.mjs"),
}


def command(client: str) -> list[str]:
    """What runs a client's driver; raises ``Missing``."""
    program, driver = DRIVERS[client]
    return program(driver)
