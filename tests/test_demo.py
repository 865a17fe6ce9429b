"""The demonstration: the bundled guard, the real gateway, the real SDK; what its table must show."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def output() -> str:
    command = [sys.executable, "-m", "guard_middleware.cli", "demo", "--no-serve"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def row(output: str, name: str) -> str:
    """The cells of the table's row whose request reads ``name``, joined line by line."""
    for block in output.split("├"):
        lines = [
            [cell.strip() for cell in line.split("│")[1:-1]] for line in block.splitlines() if line.startswith("│")
        ]
        columns = [" ".join(cell for cell in column if cell) for column in zip(*lines, strict=True)]
        if columns and columns[0] == name:
            return " | ".join(columns[1:])
    raise AssertionError(f"no row {name!r}")


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("benign text", ["stop", "input: unharmful -> allow", "output: unharmful -> allow"]),
        ("harmful text", ["BadRequestError 400 content_filter", "input: harmful -> block"]),
        ("benign picture", ["stop", "input: unharmful -> allow"]),
        ("typographic attack", ["BadRequestError 400 content_filter", "input: harmful -> block"]),
        ("harmful answer", ["content_filter", "output: harmful -> block"]),
        ("streamed, benign", ["stream ended with stop", "output: unharmful -> allow"]),
        ("streamed, harmful answer", ["stream ended with content_filter", "output: harmful -> block"]),
        ("multi-turn, harmful at the end", ["BadRequestError 400 content_filter", "input: harmful -> block"]),
        ("harmful text, shadow policy", ["stop", "would block"]),
        ("harmful text, annotate policy", ["with `moderation`", "input: harmful -> annotate"]),
    ],
)
def test_each_stop_of_the_tour_shows_its_decision(output: str, name: str, seen: list[str]) -> None:
    shown = row(output, name)
    for text in seen:
        assert text in shown


def test_every_decision_comes_with_the_guards_reasoning(output: str) -> None:
    assert output.count("Step 1:") >= 10


def test_it_says_what_is_scripted_and_what_to_try_next(output: str) -> None:
    assert "scripted upstream (no model)" in output
    assert "curl -si http://127.0.0.1:" in output
