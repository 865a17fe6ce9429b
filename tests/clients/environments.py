"""Where each client runs: this interpreter, a virtual environment of its own, or node.

The last two are made once, from exact versions, in ``.clients/`` at the repository's root, which git ignores. Where
there is no npm or no registry they raise ``Missing``.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.support.virtualenv import CACHE, Missing, made, once, run

__all__ = ["Missing", "command", "variables"]

HERE = Path(__file__).parent


def variables() -> dict[str, str]:
    """This process's own without proxies, which would be asked for loopback addresses too, and without its path."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {name: value for name, value in kept.items() if name != "PYTHONPATH"}


def _here(driver: str) -> list[str]:
    return [sys.executable, str(HERE / "drivers" / driver)]


def _python(driver: str) -> list[str]:
    return [str(made("python", HERE / "requirements.txt")), str(HERE / "drivers" / driver)]


def _node(driver: str) -> list[str]:
    """node, beside the installed packages: modules are looked up from where the driver lies."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        raise Missing("there is no npm")
    install = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    folder = CACHE / "js"
    folder.mkdir(parents=True, exist_ok=True)
    for file in (HERE / "js").iterdir():
        shutil.copy(file, folder)
    once("js", HERE / "js" / "package-lock.json", lambda folder: run(install, folder))
    return ["node", str(folder / driver)]


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
