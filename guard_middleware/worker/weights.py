"""Which guard ``--model`` names, where its files are, and the facts of serving it.

``nano`` is the guard inside this package; a path is a local folder; anything else is a hub id
(``yueliu1999/GuardReasoner-VL-Eco-3B``), whose snapshot is fetched through huggingface_hub, or read from its cache
with ``HF_HUB_OFFLINE=1``. A folder has the published layout; it may also hold ``guard.json`` with the facts below,
and the published weights have none, so the defaults are theirs.

``revision`` covers every file that decides a verdict, ``guard.json`` too; no file states it. What an operator
changes of how a guard is served is named beside it (``serving``).

Refuses: a folder without weights or tokenizer, another architecture, an unknown or mistyped key in ``guard.json``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from guard_middleware.errors import ConfigError

NANO = Path(__file__).resolve().parents[1] / "models" / "nano"
ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
FACTS = "guard.json"
#: what decides a verdict beside the weights, where it is there
_DECIDING = ("tokenizer.json", "config.json", "generation_config.json", "preprocessor_config.json", FACTS)
#: a folder of the hub's cache, where a commit is a place
_COMMIT = re.compile(r"/models--[^/]+/snapshots/([0-9a-f]{40})$")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """How a guard is served. Lengths are tokens; ``max_pixels`` is the area of one image after scaling.

    ``reader`` is whether drawn text is read for it by default. ``window_tokens`` is the longest prompt (system turn
    and images included) that it judges well, None for all up to ``max_input_tokens``; longer content is judged in at
    most ``max_windows`` overlapping windows. ``revision`` identifies all files that decide a verdict: the first 16 hex
    digits of the SHA-256 over them, or the hub's commit. ``form`` is what a small guard fills in (see ``worker.form``).
    """

    name: str
    revision: str
    reader: bool = False
    window_tokens: int | None = None
    window_overlap: int = 64
    max_windows: int = 8
    max_new_tokens: int = 1024
    max_input_tokens: int = 8192
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 1280 * 28 * 28
    form: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    folder: Path
    facts: ModelFacts


def resolve(model: str) -> Weights:
    """The folder and facts of ``--model``; raises ``ConfigError`` that says what to do instead."""
    if model == "nano":
        return load(NANO, name="nano")
    path = Path(model).expanduser()
    if path.is_dir():
        return load(path, name=path.resolve().name)
    if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise ConfigError(f"no such folder: {model}", path="--model", remedy="give a folder, a hub id, or `nano`")
    return load(_snapshot(model), name=model)


def load(folder: Path, *, name: str) -> Weights:
    """Checks a folder and reads its facts, without loading the model."""
    config = _json(folder / "config.json")
    found = config.get("architectures") or ["an unnamed architecture"]
    if found != [ARCHITECTURE]:
        raise ConfigError(
            f"{', '.join(map(str, found))} is no guard of this kind",
            path=str(folder / "config.json"),
            remedy=f"a guard is a {ARCHITECTURE} such as yueliu1999/GuardReasoner-VL-Eco-3B",
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError("no *.safetensors in the folder", path=str(folder), remedy="save the weights as safetensors")
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError("no tokenizer.json in the folder", path=str(folder), remedy="save the fast tokenizer there")
    stated = _json(folder / FACTS) if (folder / FACTS).is_file() else {}
    return Weights(folder, _facts(stated, folder, {"name": name, "revision": _revision(folder, files)}))


def serving(changes: Mapping[str, Any]) -> str:
    """Names, in the revision of verdicts, what an operator changed of how a guard is served; empty for nothing."""
    if not changes:
        return ""
    return hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:8]


def _facts(stated: dict[str, Any], folder: Path, defaults: dict[str, Any]) -> ModelFacts:
    kinds: dict[str, Any] = {field.name: int for field in fields(ModelFacts) if field.name != "revision"}
    kinds |= {"name": str, "reader": bool, "form": dict}
    path = str(folder / FACTS)
    for key, value in stated.items():
        kind = kinds.get(key)
        if kind is None:
            raise ConfigError(f"unknown key {key!r}", path=path, remedy=f"known keys: {', '.join(kinds)}")
        if key == "window_tokens" and value is None:
            continue
        if type(value) is not kind or (kind is int and value <= 0) or (kind is str and not value):
            wanted = "a positive integer" if kind is int else f"a {kind.__name__}"
            raise ConfigError(f"{key} must be {wanted}", path=path)
    facts = ModelFacts(**{**defaults, **stated})
    if facts.window_tokens is not None and facts.window_overlap * 2 > facts.window_tokens:
        raise ConfigError("window_overlap must be at most half of window_tokens", path=path)
    return facts


def _revision(folder: Path, files: list[Path]) -> str:
    if commit := _COMMIT.search(folder.absolute().as_posix()):
        return commit[1]
    digest = hashlib.sha256()
    for file in [*files, *(path for name in _DECIDING if (path := folder / name).is_file())]:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError("the file is missing", path=str(path), remedy="give the folder of a saved model") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read as JSON ({type(error).__name__})", path=str(path)) from None
    if not isinstance(value, dict):
        raise ConfigError("must hold a JSON object", path=str(path))
    return value


def _snapshot(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except HFValidationError:
        raise ConfigError(f"{model!r} is no hub id", path="--model", remedy="write it as owner/name") from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"the hub has no model {model}, or it is private", path="--model", remedy="check the id, or set HF_TOKEN"
        ) from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{model} is not in the local cache and the hub cannot be reached ({type(error).__name__})",
            path="--model",
            remedy=f"run `hf download {model}` where there is a network, or give the folder that holds it",
        ) from None
