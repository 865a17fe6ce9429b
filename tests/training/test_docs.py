"""What the pages say of ``guard-train`` is what its command line takes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from guard_training.cli import COMMANDS, parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "guard_middleware/models/nano/README.md"]
TEXT = {page.name if page.parent == ROOT else str(page.relative_to(ROOT)): page.read_text("utf-8") for page in PAGES}


def _commands() -> dict[str, argparse.ArgumentParser]:
    actions = [a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(actions[0].choices)


def test_every_command_is_on_the_page_about_training() -> None:
    assert [name for name in COMMANDS if f"guard-train {name}" not in TEXT["docs/training.md"] and name != "card"] == []


@pytest.mark.parametrize("page", sorted(TEXT))
def test_commands_and_options_on_a_page_exist(page: str) -> None:
    known = _commands()
    for name, rest in re.findall(r"guard-train ([a-z]+)([^`\n]*)", TEXT[page]):
        assert name in known, name
        inner = [a for a in known[name]._actions if isinstance(a, argparse._SubParsersAction)]
        sub = rest.split()[0] if inner and rest.split() else ""
        found = known[name] if sub not in (inner[0].choices if inner else {}) else inner[0].choices[sub]
        options = {option for action in found._actions for option in action.option_strings}
        assert set(re.findall(r"(--[a-z][a-z-]*)", rest)) <= options, (name, rest)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_has_an_example(name: str) -> None:
    assert f"guard-train {name}" in _commands()[name].format_help()
