"""The sub-commands of ``guard-train``, a module each, and what they share."""

from __future__ import annotations

import argparse
import datetime
import sys

from rich.console import Console


def subcommand(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help: str, about: str
) -> argparse.ArgumentParser:
    """A command whose help shows ``about`` line by line, for it holds examples."""
    raw = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=help, description=about, formatter_class=raw)


def terminal(width: int = 150, *, quiet: bool = False) -> Console:
    """Where tables go: as wide as the terminal, or ``width`` columns where they go to a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else width, quiet=quiet)


def count(text: str) -> int:
    """A number of rows, questions or the like, from the command line: at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def date(text: str) -> str:
    """A date, with a time or without, from the command line; ``now`` is this second."""
    if text == "now":
        return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        return datetime.datetime.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: write it as 2026-11-21") from None
