"""The sub-commands of ``guard-train``, a module each."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console


def terminal(width: int = 150, *, quiet: bool = False) -> Console:
    """Where tables go: as wide as the terminal, or ``width`` columns where they go to a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else width, quiet=quiet)


def count(text: str) -> int:
    """A number of rows, questions or the like, from the command line: at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value
