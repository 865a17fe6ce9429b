"""A revision of a guard as a folder: weights, tokenizer, ``guard.json``, calibration, card, lineage, checksums.

``SHA256SUMS`` (as ``sha256sum -c`` reads it) names every file of the folder but itself. A revision is written beside
its place and moved there at the end, so a folder with that name is a whole one.

Refuses: a folder where a file is missing, changed or not in the checksums; weights that do not load completely; a card
without measured results.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from guard_middleware.errors import ConfigError
from guard_middleware.weights import manifest
from guard_middleware.weights.manifest import CALIBRATION, CARD, LINEAGE, SUMS
from guard_middleware.worker.calibration import read as read_calibration
from guard_middleware.worker.weights import ModelFacts, load
from guard_training.evaluation.card import BEGIN, END
from guard_training.rowfile import digest, write_json

SCHEMA = "guard_training.lineage/1"
#: What a guard's folder may hold beside the files that a revision adds.
_FILES = ("*.safetensors", "*.safetensors.index.json", "*.txt", "*.jinja", "guard.json")
_JSON = ("config", "generation_config", "preprocessor_config", "tokenizer", "tokenizer_config", "chat_template",
         "special_tokens_map", "added_tokens", "vocab")  # fmt: skip
_PACKAGES = ("guard-middleware", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")


class RevisionError(ValueError):
    """A folder that is no whole revision; the message names the file and the remedy."""


def guard_files(folder: Path) -> list[Path]:
    """The files of a guard's folder that serve: weights, tokenizer, image processor, facts."""
    found = {path for pattern in _FILES for path in folder.glob(pattern)}
    found |= {path for name in _JSON if (path := folder / f"{name}.json").is_file()}
    return sorted(path for path in found if path.name not in (SUMS, CARD))


def write_revision(
    guard: Path,
    target: Path,
    *,
    card: str,
    lineage: Mapping[str, Any],
    calibration: Mapping[str, Any] | None,
    results: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Makes the folder ``target`` of a guard; ``results`` are evaluations by name. Raises ``RevisionError`` where
    ``target`` exists."""
    if target.exists():
        raise RevisionError(f"{target} exists; delete it or give another folder")
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "results").mkdir(parents=True)
    for file in guard_files(guard):
        shutil.copyfile(file, part / file.name)
    write_json(part / LINEAGE, lineage)
    if calibration is not None:
        write_json(part / CALIBRATION, calibration)
    for name, summary in results.items():
        write_json(part / "results" / f"{name}.json", summary)
    (part / CARD).write_text(card, encoding="utf-8")
    write_sums(part)
    part.rename(target)
    return target


def _listed(folder: Path) -> dict[str, Path]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in files if path.name != SUMS}


def write_sums(folder: Path) -> None:
    """Writes ``SHA256SUMS`` of all files in the folder."""
    lines = [f"{digest(path)}  {name}\n" for name, path in _listed(folder).items()]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Raises ``RevisionError`` where the files are not those of ``SHA256SUMS``."""
    try:
        manifest.check(folder)
    except manifest.ManifestError as error:
        raise RevisionError(str(error)) from None


def check_loads(folder: Path) -> ModelFacts:
    """Loads tokenizer and weights as the worker would; raises ``RevisionError``."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from guard_training.tuning.contract import ContractError, load_contract

    try:
        facts = load(folder, name=folder.resolve().name).facts
        load_contract(str(folder))
        _, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (ConfigError, ContractError, OSError, ValueError, RuntimeError) as error:
        raise RevisionError(f"{folder}: does not load ({error})") from None
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    if wrong:
        raise RevisionError(f"{folder}: its weights are not those of its config ({len(wrong)} names, {wrong[0]})")
    try:
        read_calibration(folder, facts.revision)
    except ConfigError as error:
        raise RevisionError(str(error)) from None
    return facts


def check_card(folder: Path) -> None:
    """Raises ``RevisionError`` for a card without measured results of these very weights."""
    card = folder / CARD
    text = card.read_text("utf-8") if card.is_file() else ""
    _, begin, rest = text.partition(BEGIN)
    found, end, _ = rest.partition(END)
    if not begin or not end or "|" not in found:
        raise RevisionError(f"{card}: no measured results; write them with `guard-train card --results`")
    revision = load(folder, name=folder.resolve().name).facts.revision
    if f"revision `{revision}`" not in found:
        raise RevisionError(f"{card}: its results are of other weights than these (revision {revision}); measure these")


def verify(folder: Path) -> ModelFacts:
    """Checks everything; returns the guard's facts. Raises ``RevisionError``."""
    if not folder.is_dir():
        raise RevisionError(f"{folder}: no such folder")
    check_sums(folder)
    try:
        lineage = json.loads((folder / LINEAGE).read_text("utf-8"))
        if lineage["schema"] != SCHEMA:
            raise ValueError(lineage["schema"])
    except (OSError, ValueError, KeyError, TypeError):
        raise RevisionError(f"{folder / LINEAGE}: missing, or not of the schema {SCHEMA}") from None
    facts = check_loads(folder)
    check_card(folder)
    return facts


def data_file(role: str, path: Path) -> dict[str, Any]:
    """An entry of the lineage: a file by name and digest, never by its place."""
    return {"role": role, "file": path.name, "sha256": digest(path)}


def lineage(
    *,
    facts: ModelFacts,
    base: Mapping[str, Any] | None,
    data: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any] | None,
    made: str,
    **more: Any,
) -> dict[str, Any]:
    """Where a revision comes from. ``made`` is a date in ISO form."""
    return {
        "schema": SCHEMA,
        "name": facts.name,
        "revision": facts.revision,
        "made": made,
        "base": base,
        "data": list(data),
        "recipe": recipe,
        **more,
        **git_commit(Path(__file__).parent),
        "versions": {"python": platform.python_version(), **versions()},
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide what training gives."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit(folder: Path) -> dict[str, Any]:
    """``commit`` of the program, and whether its files differ from it (``changed``); both None outside a checkout."""
    head = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".") if head else None
    return {"commit": head, "changed": None if changed is None else bool(changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run([git, "-C", str(folder), *arguments], capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() if done.returncode == 0 else None
