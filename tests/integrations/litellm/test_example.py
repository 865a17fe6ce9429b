"""The example runs as it stands."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import httpx
import pytest
import yaml

from tests.integrations.litellm import stage
from tests.integrations.litellm.bodies import ENDPOINTS, NICE
from tests.integrations.litellm.stage import HARM, KEY, Proxy, Upstream
from tests.support.gateway import scripted_worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EXAMPLE = stage.REPOSITORY / "integrations" / "examples" / "litellm_proxy"
CHAT = ENDPOINTS["chat"]


def test_the_example_guards_what_its_readme_says(python: Path, tmp_path: Path) -> None:
    folder = tmp_path / "proxy"
    with Upstream() as upstream:
        proxy = Proxy(folder, upstream.url, None)
        for file in EXAMPLE.iterdir():
            shutil.copy(file, folder)
        proxy.environment = {"UPSTREAM_URL": f"{upstream.url}/v1", "UPSTREAM_KEY": "k", "LITELLM_MASTER_KEY": KEY}
        with scripted_worker(folder / "guard.sock"), proxy:
            response = proxy.post(CHAT.path, {"model": "good", **CHAT.text(NICE)})
            assert (response.status_code, response.headers["x-guard-action"]) == (200, "allow")
            assert proxy.post(CHAT.path, {"model": "good", **CHAT.text(HARM)}).status_code == 400
            assert response.headers["x-guard-decision-id"] in (folder / "decisions.jsonl").read_text()
            refused = httpx.post(f"{proxy.url}/v1/embeddings", json={"model": "good", "input": "x"},
                                 headers={"authorization": f"Bearer {KEY}"}, timeout=60, trust_env=False)  # fmt: skip
            assert refused.status_code == 403
            assert "guard self-test passed: guard judges requests, answers and streams" in proxy.log


def test_the_readme_names_files_that_are_there_and_fits_one_screen() -> None:
    text = (EXAMPLE / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 40
    for name in re.findall(r"\b(\w+\.yaml)\b", text):
        assert yaml.safe_load((EXAMPLE / name).read_text("utf-8"))
