"""What the tests of training share: one thread, and a tiny guard's folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from guard_training.tuning.contract import Contract, load_contract
from tests.tiny_model import make_folder


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never written to."""
    return make_folder(tmp_path_factory.mktemp("guard") / "model")


@pytest.fixture(scope="session")
def contract(folder: Path) -> Contract:
    return load_contract(str(folder))
