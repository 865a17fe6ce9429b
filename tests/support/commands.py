"""``guard-train`` in this process: what a command raises reaches the test."""

from __future__ import annotations

import argparse

from guard_training.cli import parser


def parse(*words: object) -> argparse.Namespace:
    return parser().parse_args([str(word) for word in words])


def call(*words: object) -> None:
    given = parse(*words)
    given.run(given)
