from __future__ import annotations

import runpy
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tokenizer():
    return runpy.run_path(str(Path(__file__).parents[1] / "tiny_model.py"))["make_tokenizer"]()
