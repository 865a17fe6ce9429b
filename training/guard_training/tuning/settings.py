"""Recipes: a YAML file read strictly into a frozen dataclass.

Refuses an unknown key, a missing one and a value of another type; the ``RecipeError`` names file, key and remedy.
Every constant stands in the recipe: a field is optional only where its dataclass gives a default.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

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
    hints = typing.get_type_hints(kind)
    known: dict[str, Field[Any]] = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for key in value:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}; known keys: {', '.join(known)}")
    given = {}
    for key, field in known.items():
        if key in value:
            given[key] = _read(hints[key], value[key], f"{where}: {key}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise RecipeError(f"{where}: {key} is missing; copy it from the recipe of the same command")
    try:
        return kind(**given)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


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


def _read(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        if len(options) == 1:
            return _read(options[0], value, where)
        fitting = next((option for option in options if _fits(option, value)), options[0])
        return _read(fitting, value, where)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise RecipeError(f"{where} must be one of {', '.join(map(str, arguments))}")
        return value
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise RecipeError(f"{where} must be a list")
        read = [_read(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(value)]
        return read if origin is list else tuple(read)
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise RecipeError(f"{where} must be a mapping")
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise RecipeError(f"{where} must be a mapping of {', '.join(field.name for field in fields(hint))}")
        return settings(hint, value, where)
    return _plain(hint, value, where)


def _fits(hint: Any, value: Any) -> bool:
    try:
        _read(hint, value, "")
    except RecipeError:
        return False
    return True


def _plain(hint: Any, value: Any, where: str) -> Any:
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        # YAML 1.1 reads 5e-5 as a text: a number with an exponent needs its point.
        exponent = hint is float and isinstance(value, str) and _number(value)
        raise RecipeError(f"{where} must be a {hint.__name__}{'; write it as 5.0e-5' if exponent else ''}")
    return value


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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
