from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from hypothesis import given
from hypothesis import strategies as st

from guard_training.tuning.contract import load_model
from guard_training.tuning.settings import (
    LoraSettings,
    RecipeError,
    SftSettings,
    read_settings,
    recipe_path,
    settings,
)

RECIPES = ("sft-3b", "sft-7b", "sft-nano")


@dataclass(frozen=True)
class Inner:
    depth: int
    words: list[str]


@dataclass(frozen=True)
class Outer:
    rate: float
    name: str
    on: bool
    kind: Literal["a", "b"]
    inner: Inner | None
    shares: dict[str, float]
    limit: int | None = None


INNER = {"depth": 2, "words": ["w"]}
GOOD: dict[str, Any] = {"rate": 1, "name": "x", "on": True, "kind": "a", "inner": INNER, "shares": {"s": 1}}


def test_a_recipe_becomes_a_value_with_the_types_it_names() -> None:
    made = settings(Outer, GOOD)
    assert made == Outer(1.0, "x", True, "a", Inner(2, ["w"]), {"s": 1.0})
    assert isinstance(made.rate, float)
    assert isinstance(made.shares["s"], float)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rat": 1}, "unknown key 'rat'; known keys: rate, name"),
        ({"rate": "fast"}, "rate must be a number"),
        ({"rate": "5e-5"}, r"rate must be a number; .*: write it as 5\.0e-5"),
        ({"rate": True}, "rate must be a valid number"),
        ({"rate": None}, "rate must be a valid number"),
        ({"limit": 1.5}, "limit must be a valid integer"),
        ({"limit": True}, "limit must be a valid integer"),
        ({"on": 1}, "on must be a valid boolean"),
        ({"on": "yes"}, "on must be a valid boolean"),
        ({"kind": "c"}, "kind must be 'a' or 'b'"),
        ({"name": 3}, "name must be a valid string"),
        ({"name": date(2026, 1, 2)}, "date is not JSON serializable; constants are texts"),
        ({"inner": 3}, "inner must be an object"),
        ({"inner": {"depth": 2}}, r"inner\.words is missing"),
        ({"inner": {"depth": 2, "words": ["w"], "x": 1}}, "inner: unknown key 'x'; known keys: depth, words"),
        ({"inner": {"depth": 2, "words": ["w", 3]}}, r"inner\.words\[1\] must be a valid string"),
        ({"inner": {"depth": 2, "words": "w"}}, r"inner\.words must be a valid array"),
        ({"shares": {"s": "much"}}, r"shares\.s must be a number"),
        ({"shares": [1]}, "shares must be an object"),
    ],
)
def test_a_wrong_recipe_is_refused_by_the_name_of_its_key(change: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        settings(Outer, GOOD | change)


@pytest.mark.parametrize("key", ["rate", "name", "on", "kind", "inner", "shares"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(RecipeError, match=f"here: {key} is missing"):
        settings(Outer, {k: v for k, v in GOOD.items() if k != key}, "here")


@given(
    st.dictionaries(st.sampled_from([*GOOD, "limit"]), st.none() | st.booleans() | st.integers() | st.text(max_size=3))
)
def test_any_value_is_either_taken_or_refused_as_a_recipe(change: dict[str, Any]) -> None:
    try:
        made = settings(Outer, GOOD | change)
    except RecipeError:
        return
    assert type(made.rate) is float
    assert type(made.on) is bool
    assert made.kind in ("a", "b")


def _file(folder: Path, value: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return path


def test_changes_from_the_command_line_are_read_as_yaml(tmp_path: Path) -> None:
    changes = ["rate=2.5e-1", "inner.depth=7", "limit=9", "shares={t: 0.5}"]
    made = read_settings(Outer, _file(tmp_path, GOOD), changes)
    assert (made.rate, made.inner, made.limit, made.shares) == (0.25, Inner(7, ["w"]), 9, {"t": 0.5})
    assert read_settings(Outer, _file(tmp_path, GOOD), ["inner=null"]).inner is None


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("a: [", [], "cannot be read as YAML"),
        ("- 1", [], "a mapping of names"),
        (GOOD, ["rate"], "write it as key=value"),
        (GOOD, ["=3"], "write it as key=value"),
        (GOOD, ["name.x=3"], "name holds no keys"),
        (GOOD, ["name=[1"], "no YAML"),
        (GOOD, ["banana=1"], "unknown key 'banana'"),
        ("rate: &a [*a]", [], "Circular reference"),
    ],
)
def test_unreadable_files_and_changes_are_refused(tmp_path: Path, text: Any, changes: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        read_settings(Outer, _file(tmp_path, text), changes)


def test_a_recipe_is_found_by_name_or_by_path(tmp_path: Path) -> None:
    assert recipe_path("sft-3b").name == "sft-3b.yaml"
    assert recipe_path(str(_file(tmp_path, GOOD))) == tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match=r"no recipe banana; give a file, or one of .*sft-3b"):
        recipe_path("banana")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_settings(Outer, tmp_path)


@pytest.mark.parametrize("name", RECIPES)
def test_the_shipped_recipes_are_whole(name: str) -> None:
    assert read_settings(SftSettings, recipe_path(name)).cutoff > 0


@pytest.mark.parametrize("name", ["sft-3b", "sft-7b"])
def test_the_big_recipes_are_the_papers(name: str) -> None:
    recipe = read_settings(SftSettings, recipe_path(name))
    paper = dict(learning_rate=5e-5, scheduler="cosine", warmup_steps=0, epochs=3.0, cutoff=2048, global_batch=192,
                 batch_per_device=6, max_grad_norm=1.0, precision="bf16", freeze_vision=True, freeze_projector=True,
                 lora=None)  # fmt: skip
    assert {key: getattr(recipe, key) for key in paper} == paper
    assert recipe.accumulation(4) == 8


def test_the_batch_stays_the_recipes_whatever_the_devices() -> None:
    recipe = read_settings(SftSettings, recipe_path("sft-3b"))
    assert [recipe.accumulation(devices) for devices in (1, 2, 4, 8, 16)] == [32, 16, 8, 4, 2]
    with pytest.raises(RecipeError, match="192 is no multiple of 6 rows on 5 devices; change batch_per_device"):
        recipe.accumulation(5)


@pytest.mark.parametrize("change", ["epochs=0", "learning_rate=-1.0", "cutoff=0", "batch_per_device=0", "save_every=0"])
def test_settings_that_cannot_train_are_refused(change: str) -> None:
    with pytest.raises(RecipeError, match=f"{change.split('=')[0]} must be above 0"):
        read_settings(SftSettings, recipe_path("sft-3b"), [change])


def test_adapters_are_a_mapping_in_the_recipe() -> None:
    adapters = "lora={rank: 4, scale: 8, dropout: 0.0, targets: [q_proj]}"
    recipe = read_settings(SftSettings, recipe_path("sft-nano"), [adapters, "lora.rank=2"])
    assert recipe.lora == LoraSettings(2, 8, 0.0, ["q_proj"])
    with pytest.raises(RecipeError, match="lora: rank must be above 0"):
        read_settings(SftSettings, recipe_path("sft-nano"), [adapters, "lora.rank=0"])


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")])
def test_accelerate_knows_every_key_of_the_shipped_configurations(name: str, kind: str) -> None:
    config = load_config_from_file(f"training/recipes/accelerate/{name}.yaml")
    assert (config.distributed_type, config.mixed_precision) == (kind, "bf16")


def test_fsdp_shards_by_layers_that_the_guard_has_and_saves_whole_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    words = ["--config_file", "training/recipes/accelerate/fsdp2.yaml", "-m", "guard_training", "sft"]
    for key, value in prepare_multi_gpu_env(
        _validate_launch_command(launch_command_parser().parse_args(words))[0]
    ).items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.state_dict_type.name) == (2, "FULL_STATE_DICT")
    assert set(plugin.transformer_cls_names_to_wrap) <= {type(part).__name__ for part in load_model(folder).modules()}
