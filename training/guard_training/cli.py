"""``guard-train``: makes guards and measures them."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

from guard_middleware.errors import GuardMiddlewareError
from guard_training.process import INTERRUPTED, ended_by_sigterm

#: The sub-commands, in the order of the work: a module of ``guard_training.commands`` each.
COMMANDS = (
    "corpus", "synthesize", "sft", "reject", "augment", "grpo", "sweep", "evaluate", "baseline", "robustness", "audit",
    "bias", "generalise", "calibrate", "update", "publish", "nano", "tower", "card",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="guard-train", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        importlib.import_module(f"guard_training.commands.{name}").add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 done, 1 an input that cannot be used, 2 a wrong command line, 130 stopped by Ctrl-C.

    SIGTERM ends the process with 143, after what it started.
    """
    given = parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = given.run
    try:
        with ended_by_sigterm():
            run(given)
    except (OSError, ValueError, GuardMiddlewareError) as error:  # OSError: no such file, a folder, a full disk
        print(f"guard-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("guard-train: stopped; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0
