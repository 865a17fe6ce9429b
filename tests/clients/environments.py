"""Where each client runs: this interpreter, a virtual environment of its own, or node."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
DRIVERS: Mapping[str, str] = {
    "openai (Python)": "drivers/openai_sdk.py",
    "anthropic (Python)": "drivers/anthropic_sdk.py",
}


@dataclass(frozen=True)
class Environment:
    """``program`` runs a client's driver."""

    program: str

    def command(self, client: str) -> list[str]:
        return [self.program, str(HERE / DRIVERS[client])]

    def variables(self) -> dict[str, str]:
        """The process's own without proxies, which would be asked for loopback addresses too."""
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        return {name: value for name, value in kept.items() if name != "PYTHONPATH"}


PROJECT = Environment(sys.executable)
