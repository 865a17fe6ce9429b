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


def _parts(of: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [a for a in of._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


def _commands() -> dict[str, argparse.ArgumentParser]:
    return _parts(parser())


def test_every_command_is_on_the_page_about_training() -> None:
    assert [name for name in COMMANDS if f"guard-train {name}" not in TEXT["docs/training.md"] and name != "card"] == []


@pytest.mark.parametrize("page", sorted(TEXT))
def test_commands_and_options_on_a_page_exist(page: str) -> None:
    known = _commands()
    for name, rest in re.findall(r"guard-train ([a-z]+)([^`\n]*)", TEXT[page]):
        assert name in known, name
        found = _parts(known[name]).get(next(iter(rest.split()), ""), known[name])
        options = {option for action in found._actions for option in action.option_strings}
        assert set(re.findall(r"(--[a-z][a-z-]*)", rest)) <= options, (name, rest)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_and_part_has_an_example(name: str) -> None:
    command = _commands()[name]
    assert f"guard-train {name}" in command.format_help()
    for part, inner in _parts(command).items():
        assert f"guard-train {name} {part}" in inner.format_help()


def test_the_stage_that_update_starts_itself_is_not_in_its_help() -> None:
    assert "--stage" not in _commands()["update"].format_help()
