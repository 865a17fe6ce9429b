"""Pushes a verified revision to the Hugging Face hub.

Refuses: no token, a name that is no ``owner/name``, a public push where the repository is to be private and is not.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from guard_middleware.worker.weights import ModelFacts

_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
#: The hub's HTTP library is another one from version to version; its errors are always bases of this one.
_NETWORK: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)


class HubError(ValueError):
    """The push did not happen; the message says what to do."""


def push(folder: Path, repo: str, facts: ModelFacts, *, private: bool) -> str:
    """Uploads the folder as one commit and returns its address."""
    if not _NAME.fullmatch(repo):
        raise HubError(f"{repo!r} is no hub id; write it as owner/name")
    token = get_token()
    if token is None:
        raise HubError("no token for the hub; set HF_TOKEN, or run `hf auth login`, with a token that may write")
    api = HfApi(token=token)
    try:
        made = api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        # what exists keeps its visibility, whatever is asked for here
        if private and not api.repo_info(repo, repo_type="model").private:
            raise HubError(f"{repo} exists and is public; make it private on the hub first, or leave --private out")
        done = api.upload_folder(
            folder_path=folder,
            repo_id=repo,
            repo_type="model",
            commit_message=f"{facts.name}, revision {facts.revision}",
            # weights of an earlier revision in more shards would be loaded beside the new ones
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
    except HfHubHTTPError as error:
        raise HubError(
            f"the hub refused ({error.response.status_code} {error.server_message or ''}".rstrip()
            + "); check that the "
            f"token may write to {repo}"
        ) from None
    except _NETWORK as error:
        raise HubError(f"the hub cannot be reached ({type(error).__name__}); the same command tries again") from None
    return str(getattr(done, "commit_url", None) or made)
