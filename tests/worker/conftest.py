from __future__ import annotations

import runpy
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A random Qwen2.5-VL of the published layout (no guard.json), a few hundred kilobytes."""
    pytest.importorskip("torch")
    make = runpy.run_path(str(Path(__file__).parents[1] / "tiny_model.py"))["make_folder"]
    return make(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return runpy.run_path(str(Path(__file__).parents[1] / "tiny_model.py"))["make_tokenizer"]()
