from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError

from guard_middleware.worker.weights import ModelFacts
from guard_training.update import hub
from guard_training.update.hub import HubError, push

FACTS = ModelFacts("small", "abc123")


class Client:
    """Stands for ``HfApi``."""

    def __init__(self, calls: list[Any], *, public: bool = False, error: Exception | None = None) -> None:
        self.calls, self.public, self.error = calls, public, error

    def __call__(self, token: str) -> Client:
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo: str, **more: Any) -> str:
        if self.error:
            raise self.error
        self.calls.append(("create", repo, more["private"]))
        return f"https://hub/{repo}"

    def repo_info(self, repo: str, **more: Any) -> Any:
        return SimpleNamespace(private=not self.public)

    def upload_folder(self, **more: Any) -> Any:
        self.calls.append(("upload", more))
        return SimpleNamespace(commit_url=f"https://hub/{more['repo_id']}/commit/1")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(hub, "get_token", lambda: "secret")
    monkeypatch.setattr(hub, "HfApi", Client(found))
    return found


def test_the_folder_goes_up_as_one_commit_that_names_the_revision(calls: list[Any], tmp_path: Path) -> None:
    assert push(tmp_path, "owner/name", FACTS, private=True) == "https://hub/owner/name/commit/1"
    assert calls[:2] == [("token", "secret"), ("create", "owner/name", True)]
    given = calls[2][1]
    assert (given["folder_path"], given["repo_id"], given["repo_type"]) == (tmp_path, "owner/name", "model")
    assert given["commit_message"] == "small, revision abc123"
    assert "*.safetensors" in given["delete_patterns"]


def test_without_a_token_nothing_is_tried(calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(HubError, match="set HF_TOKEN"):
        push(tmp_path, "owner/name", FACTS, private=True)
    assert calls == []


@pytest.mark.parametrize("repo", ["name", "a/b/c", "owner/", "owner/na me", ""])
def test_a_name_that_is_no_hub_id_is_refused(calls: list[Any], tmp_path: Path, repo: str) -> None:
    with pytest.raises(HubError, match="owner/name"):
        push(tmp_path, repo, FACTS, private=False)
    assert calls == []


def test_private_weights_never_go_to_a_public_repository(
    calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HfApi", Client(calls, public=True))
    with pytest.raises(HubError, match="is public"):
        push(tmp_path, "owner/name", FACTS, private=True)
    assert not any(call[0] == "upload" for call in calls)
    push(tmp_path, "owner/name", FACTS, private=False)
    assert calls[-1][0] == "upload"


def _refusal() -> HfHubHTTPError:
    response = httpx.Response(403, request=httpx.Request("POST", "https://hub/api"))
    return HfHubHTTPError("no", response=response, server_message="read-only token")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "words"),
    [(_refusal(), r"403 read-only token.*may write to owner/name"), (ConnectionError("x"), "cannot be reached")],
)
def test_what_the_hub_says_is_told(
    calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    monkeypatch.setattr(hub, "HfApi", Client(calls, error=error))
    with pytest.raises(HubError, match=words):
        push(tmp_path, "owner/name", FACTS, private=False)
