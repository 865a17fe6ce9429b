"""The sub-commands of ``guard-train``, a module each."""

from __future__ import annotations

import sys

from rich.console import Console


def terminal(width: int) -> Console:
    """Where tables go: as wide as the terminal, or ``width`` columns where they go to a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=width)
