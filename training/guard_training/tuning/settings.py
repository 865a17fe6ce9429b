"""Recipes: a YAML file read strictly into a frozen dataclass.

Refuses an unknown key, a missing one and a value of another type; the ``RecipeError`` names file, key and remedy.
Every constant stands in the recipe: a field is optional only where its dataclass gives a default.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

T = TypeVar("T")


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the key and the remedy."""


def recipe_path(name: str) -> Path:
    """A recipe by path, or by name among those of the repository or of the installed package."""
    package = Path(__file__).resolve().parents[1]
    folders = (package.parent / "recipes", package / "recipes")
    candidates = [Path(name), *(folder / f"{name}.yaml" for folder in folders)]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        known = sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))
        raise RecipeError(f"no recipe {name}; give a file, or one of {', '.join(known)}")
    return found


def read_settings(kind: type[T], path: Path, changes: Sequence[str] = ()) -> T:
    """The settings in a YAML file, with ``key=value`` changes (values in YAML, ``a.b=1`` for nested keys)."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of names to constants")
    for change in changes:
        _change(value, change)
    return settings(kind, value, str(path))


def settings(kind: type[T], value: Mapping[str, Any], where: str = "recipe") -> T:
    """The settings in a mapping; raises ``RecipeError``."""
    try:
        # By way of JSON: in strict mode pydantic makes no dataclass, tuple or path of a Python value.
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True, extra="forbid")
    except ValidationError as error:
        # a key that is misspelt is missing too: what was written says more
        first = min(error.errors(), key=lambda one: one["type"] != "unexpected_keyword_argument")
        raise RecipeError(f"{where}: {_reason(kind, first)}") from None
    except (TypeError, ValueError, RecursionError) as error:  # a date, or an alias of what holds it
        raise RecipeError(f"{where}: {error}; constants are texts, numbers, true and false, lists, mappings") from None


def _reason(kind: type, error: ErrorDetails) -> str:
    *outer, key = error["loc"] or ("",)
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    match error["type"]:
        case "unexpected_keyword_argument":
            place = f"{path.rpartition('.')[0]}: " if outer else ""
            return f"{place}unknown key {key!r}; known keys: {', '.join(field.name for field in _fields(kind, outer))}"
        case "missing":
            return f"{path} is missing; copy it from the recipe of the same command"
        case "value_error":
            return f"{path}: {error['ctx']['error']}" if path else str(error["ctx"]["error"])
        case "float_type" if isinstance(error["input"], str):
            # YAML 1.1 reads 5e-5 as a text
            return f"{path} must be a number; one with an exponent needs its point: write it as 5.0e-5"
    return f"{path} {error['msg'].replace('Input should be', 'must be')}"


def _fields(kind: Any, path: Sequence[int | str]) -> tuple[Field[Any], ...]:
    """Those of the dataclass that stands at ``path``."""
    for key in path:
        hint = typing.get_type_hints(kind)[str(key)]
        kind = next(filter(is_dataclass, (hint, *typing.get_args(hint))))
    return fields(kind)


def _change(value: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {change}: write it as key=value")
    *outer, last = key.strip().split(".")
    for name in outer:
        inner = value.get(name)
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {change}: {name} holds no keys in this recipe")
        value = inner
    try:
        value[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"--set {change}: the value is no YAML") from None


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Low-rank adapters on the language model's linear layers. ``scale`` is LoRA's alpha."""

    rank: int
    scale: int
    dropout: float
    targets: list[str]

    def __post_init__(self) -> None:
        _positive(self, "rank", "scale")


@dataclass(frozen=True, slots=True)
class SftSettings:
    """See ``recipes/sft-3b.yaml`` for what each constant does and where it comes from.

    ``global_batch`` and ``batch_per_device`` are rows, ``cutoff`` tokens (image tokens and answer included),
    ``max_pixels`` the area of one image. ``architecture`` is a config.json beside the recipe, for runs without weights.
    """

    seed: int
    model: str
    architecture: str | None
    epochs: float
    learning_rate: float
    scheduler: Literal["cosine", "linear", "constant"]
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    global_batch: int
    batch_per_device: int
    cutoff: int
    max_pixels: int | None
    reader: bool
    precision: Literal["bf16", "fp32"]
    gradient_checkpointing: bool
    freeze_vision: bool
    freeze_projector: bool
    lora: LoraSettings | None
    save_every: int
    keep_checkpoints: int
    log_every: int

    def __post_init__(self) -> None:
        _positive(self, "epochs", "learning_rate", "global_batch", "batch_per_device", "cutoff", "max_grad_norm")
        _positive(self, "save_every", "keep_checkpoints", "log_every")

    def accumulation(self, devices: int) -> int:
        """Micro-batches per step that make ``global_batch`` on so many devices; raises ``RecipeError``."""
        rows = self.batch_per_device * devices
        if self.global_batch % rows:
            raise RecipeError(
                f"global_batch {self.global_batch} is no multiple of {self.batch_per_device} rows on {devices} "
                "devices; change batch_per_device, which does not change the training"
            )
        return self.global_batch // rows


def _positive(value: Any, *names: str) -> None:
    for name in names:
        if not getattr(value, name) > 0:
            raise RecipeError(f"{name} must be above 0")
