"""The import contracts say who may import whom, of every module there is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_module_of_the_gateway_is_named_by_a_contract() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = re.findall(r"guard_middleware[.\w]+", str(project["tool"]["importlinter"]["contracts"]))
    files = [path for path in ROOT.glob("guard_middleware/**/*.py") if path.name != "__init__.py"]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    assert modules
    assert [module for module in modules if not any(f"{module}.".startswith(f"{name}.") for name in named)] == []
