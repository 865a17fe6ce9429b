"""What the README shows is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from guard_middleware import config
from guard_middleware.limits import Limits
from guard_middleware.policy import PolicySet

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_policy_is_a_valid_configuration() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    policies = PolicySet(config.parse(example))
    chosen = policies.resolve(path="/v1/chat/completions", tenant="research", peer_trusted=True)
    assert (chosen.name, chosen.input.on_harmful) == ("watch", "shadow")
    assert policies.resolve(path="/v1/chat/completions").name == "chat-ui"


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ("request body | 20 MiB, 30 s", (Limits().body_bytes, Limits().body_seconds) == (20 * 2**20, 30.0)),
        ("JSON nesting | 64", Limits().json_depth == 64),
        (
            "images per request; bytes and pixels of one | 20; 4 MiB, 20 Mpx",
            (Limits().images, Limits().image_bytes, Limits().image_pixels) == (20, 4 * 2**20, 20_000_000),
        ),
        ("choices (`n`) | 4", Limits().choices == 4),
        ("the upstream's answer, all of it held | 8 MiB", Limits().answer_bytes == 8 * 2**20),
        ("the upstream's silence | 120 s", Limits().upstream_seconds == 120.0),
        (
            "verdict deadline, per policy | 10 s input, 20 s output",
            (config.SourcePolicy().deadline, config.OutputPolicy().deadline) == (10.0, 20.0),
        ),
    ],
)
def test_the_limits_table_states_the_defaults(row: str, value: bool) -> None:
    assert f"| {row} |" in README
    assert value


def test_every_page_that_it_names_exists() -> None:
    root = Path(__file__).parents[1]
    pages = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert pages
    assert [link for link in pages if not (root / link).exists()] == []
